"""A device that computes as the CPU does and refuses what a GPU refuses: tensors of two devices in one operation, and what Apple's lacks, float64.

So a machine without a GPU notices what would only fail on one. PyTorch lets Python stand in for a device since 2.9. `install` is for a process of its own."""
import importlib
import pkgutil

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

import fuselip_edu
from fuselip_edu.core import pick_device

READY = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}  # from one device to another
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}  # places may lie on the CPU
kept = []  # registrations last as long as these


def elsewhere(device): return device is not None and torch.device(device).type == "elsewhere"


class Elsewhere(torch.Tensor):
    "A tensor of that device; its numbers are in `here`."
    @staticmethod
    def __new__(cls, here):
        if here.dtype == torch.float64: raise TypeError("elsewhere there is no float64")
        tensor = torch.Tensor._make_wrapper_subclass(cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=torch.device("elsewhere", 0))
        tensor.here = here.detach()
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None): return compute(operation, args, kwargs or {})

    def tolist(self): return self.here.tolist()

    def numpy(self, *args, **kwargs): raise TypeError("a tensor that is elsewhere has no numpy array; take it to the CPU first")

    __array__ = numpy


def compute(operation, args, kwargs): # on the CPU; the result is where a real device would leave it
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    changed = operation._schema.arguments[0].alias_info if args and isinstance(args[0], torch.Tensor) else None
    in_place = changed is not None and changed.is_write
    joined = operation in (aten.cat.default, aten.stack.default)
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and (tensor.ndim or joined or in_place and tensor is args[0])]  # a single number may come from the CPU, to be read
    if operation in INDEXING and isinstance(args[0], Elsewhere): strangers = [tensor for tensor in strangers if len(args) > 2 and tensor is args[2]]  # values to be put must be there
    if away and strangers and operation not in CROSSING:
        raise RuntimeError(f"{operation} of two devices: {[tuple(tensor.shape) for tensor in strangers]} lie on the CPU")
    if operation is aten._fused_sdp_choice.default: return 0  # attention written out
    leaves = elsewhere(kwargs["device"]) if kwargs.get("device") is not None else bool(away)
    at_home = lambda values: tree_map_only(Elsewhere, lambda tensor: tensor.here, tree_map_only(torch.device, lambda device: torch.device("cpu"), values))
    result = operation(*at_home(args), **at_home({name: value for name, value in kwargs.items() if name != "pin_memory"}))
    if in_place: return args[0]
    if not leaves: return result
    same = {id(tensor.here): tensor for tensor in away}
    return tree_map_only(torch.Tensor, lambda tensor: same[id(tensor)] if id(tensor) in same else Elsewhere(tensor), result)


class Backend(backend_registration._DummyBackendModule if READY else object):
    "What PyTorch asks of a device's module."
    def get_amp_supported_dtype(self): return [torch.bfloat16]


def install():
    "Make `elsewhere` a device in this process, for `pick_device` and so for every command, too."
    backend_registration._setup_privateuseone_for_python_backend("elsewhere", Backend())
    everything, numbers = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    kept.extend((everything, numbers))
    everything.fallback(lambda operation, *args, **kwargs: compute(operation, args, kwargs), "PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):  # which PyTorch makes by resizing
        numbers.impl(name, lambda *args, device=None, pin_memory=None, **kwargs: Elsewhere(torch.arange(*args, **{key: value for key, value in kwargs.items() if value is not None})), "PrivateUse1")
    plain_tensor = torch.tensor
    torch.tensor = lambda *args, device=None, **kwargs: plain_tensor(*args, **kwargs).to(device) if elsewhere(device) else plain_tensor(*args, device=device, **kwargs)
    for module in pkgutil.iter_modules(fuselip_edu.__path__):
        if module.name == "__main__": continue
        module = importlib.import_module(f"fuselip_edu.{module.name}")
        if getattr(module, "pick_device", None) is pick_device: module.pick_device = lambda name="auto": torch.device(name) if elsewhere(name) else pick_device(name)
