"""For mkdocs: on the site, links that lead out of docs/ lead to GitHub."""

import re


_OUTSIDE = re.compile(r"(!?)(\[[^\]]*\])\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown, page, config, files):
    def replace(match):
        # A picture is shown from its file, else from GitHub's page of it.
        form = "raw" if match[1] else "blob"
        address = f"{config['repo_url'].rstrip('/')}/{form}/main/{match[3]}"
        return f"{match[1]}{match[2]}({address})"

    return _OUTSIDE.sub(replace, markdown)
