"FuseLIP built step by step; the names used most are importable from here, and loaded at first use; the others are in the modules of their chapters."
__version__ = "0.1.0"

_HOMES = {
    "core": ("seed_everything", "pick_device", "load_image", "show_images"),
    "pairs": ("Item", "Pair", "Query"),
    "shapes": ("Scene", "render", "sample_scene", "scene_at"),
    "quantize": ("VectorQuantizer",),
    "transformer": ("Transformer",),
    "titok": ("TiTok", "TiTokConfig", "TokenizerTrainConfig", "train_tokenizer"),
    "text": ("BPE", "CLIPBPE"),
    "vocab": ("ItemTokenizer", "Vocab"),
    "fuselip": ("FuseLIP", "FuseLIPConfig"),
    "contrastive": ("sigmoid_loss", "softmax_loss"),
    "masking": ("mask_tokens", "masked_loss"),
    "transforms": ("transform_pairs",),
    "sources": ("CSVSource", "ShapesSource", "open_source"),
    "batches": ("MixedSource", "SourcePairs", "TokenPairs", "grouped_batches", "open_data", "tokenize_pairs"),
    "token_cache": ("CachedPairs",),
    "distributed": ("World", "init_distributed", "sharded_sigmoid_loss"),
    "train": ("Config", "TrainConfig", "preset"),
    "evaluate": ("rank_queries", "results_table", "shapes_tasks"),
    "baselines": ("LateFusion", "LateFusionConfig", "load_model"),
    "filip": ("FILIP", "FILIPConfig"),
    "ett": ("ETT", "ETTConfig"),
    "explore": ("ImageIndex",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'fuselip_edu' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"fuselip_edu.{_HOME[name]}"), name)


def __dir__(): return [*globals(), *__all__]
