"""For mkdocs: addresses, README's sections, and links out of docs/.

The addresses are those of pyproject.toml.
"""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"(!?)(\[[^\]]*\])\(\.\./([^)\s]+)\)")
_SECTION = re.compile(r"<!-- README: (.+?) -->")


def on_config(config):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = dict(
        re.findall(
            r'^(Repository|Documentation) = "(.+)"$', project, re.MULTILINE
        )
    )
    config["repo_url"], config["repo_name"] = urls["Repository"], "GitHub"
    config["site_url"] = urls["Documentation"] + "/"
    return config


def section(heading: str) -> str:
    """Return a section of README, its links as seen from docs/."""
    found = re.search(
        rf"^## {heading}$.*?(?=^## )",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M | re.S,
    )
    links = re.sub(r"\]\((?!https?:|docs/|#)", "](../", found[0])
    return links.replace("](docs/", "](").rstrip()


def on_page_markdown(markdown, page, config, files):
    def replace(match):
        # A picture is shown from its file, else from GitHub's page of it.
        form = "raw" if match[1] else "blob"
        address = f"{config['repo_url'].rstrip('/')}/{form}/main/{match[3]}"
        return f"{match[1]}{match[2]}({address})"

    return _OUTSIDE.sub(
        replace, _SECTION.sub(lambda match: section(match[1]), markdown)
    )
