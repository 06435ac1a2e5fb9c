"What setuptools needs to know stands in settings.ini, where nbdev 2 reads it too."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf8")
cfg = ini["DEFAULT"]
lab_requirements = cfg["lab_requirements"].split()
site_requirements = cfg["site_requirements"].split()
quantizers_requirements = cfg["quantizers_requirements"].split()
test_requirements = lab_requirements + site_requirements + quantizers_requirements
test_requirements += cfg["test_requirements"].split()
dev_requirements = cfg["dev_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["beit_nb", "beit_nb.*"]),
    install_requires=cfg["requirements"].split(),
    package_data={
        "beit_nb": ["py.typed", "nets/*", "evidence/*", "bands/*", "cards/*"],
        "beit_nb.explorers": ["*.js", "*.css"],
    },
    extras_require={
        "lab": lab_requirements,
        "site": site_requirements,
        "quantizers": quantizers_requirements,
        "test": test_requirements,
        "dev": test_requirements + dev_requirements,
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["beit_nb=beit_nb._modidx:d"],
    },
)
