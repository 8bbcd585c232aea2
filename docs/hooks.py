"""For mkdocs: links that lead out of docs/, right as they are on GitHub, lead to the repository on the site."""

import re


_OUTSIDE = re.compile(r"(!?)(\[[^\]]*\])\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown, page, config, files):
    def replace(match):
        # A picture is shown from its file, anything else from the page that GitHub makes of it.
        form = "raw" if match[1] else "blob"
        return f"{match[1]}{match[2]}({config['repo_url'].rstrip('/')}/{form}/main/{match[3]})"

    return _OUTSIDE.sub(replace, markdown)
