"Reads settings.ini, the single place for name, version, requirements and scripts."
from configparser import ConfigParser

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {name: settings[f"{name}_requirements"].split() for name in ("notebooks", "vqa", "dev", "docs")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["fuselip_edu", "fuselip_edu.*"]),
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split("\n")},
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
)
