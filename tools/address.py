"""Write where the project is published into its links, badges and notebooks: `make address`.

python tools/address.py [https://github.com/owner/name]     without an address: that of the git remote `origin`
"""

import re
import subprocess
import sys
from pathlib import Path

PLACEHOLDER = "OWNER/REPOSITORY"
FILES = ("*.md", "docs/*.md", "notebooks/**/*.ipynb")
WANTED = "say where it is published: make address REPO_URL=https://github.com/owner/name"


def repository(address: str) -> str:
    """Return `owner/name` of a GitHub address as the browser or git has it; "" for anything else."""
    start = r"(?:https://(?:[^/@\s]+@)?github\.com/|(?:ssh://)?git@github\.com[:/])"
    found = re.fullmatch(rf"{start}([\w-]+)/([\w.-]+?)(?:\.git)?(?:/tree/main)?/?", address, re.ASCII)
    return "/".join(found.groups()) if found and found[2].strip(".") else ""


def rewrite(text: str, old: str, new: str) -> str:
    """Return the text with the repository `old`, or the placeholder, replaced by `new` in every address on GitHub."""
    end = r"(?![\w-])(?!\.(?!git\b)\w)"  # not the start of a longer name
    known = "|".join(map(re.escape, (old, PLACEHOLDER)))
    text = re.sub(rf"(github\.com/|research\.google\.com/github/)(?:{known}){end}", lambda found: found[1] + new, text)
    return re.sub(r'(repo_url: str = \\")[^"\\]*', lambda found: f"{found[1]}https://github.com/{new}", text)


def main(project: Path, address: str = "") -> None:
    if not address:
        origin = subprocess.run(["git", "remote", "get-url", "origin"], cwd=project, capture_output=True, text=True)
        address = origin.stdout.strip()
        if not address:
            sys.exit(f"The project has no git remote `origin`: {WANTED}")
    new = repository(address)
    if not new:  # the address itself is not shown: it may hold a token
        sys.exit(f"The address is not one of a repository on GitHub: {WANTED}")
    readme = (project / "README.md").read_text(encoding="utf-8")
    badge = re.search(r"colab\.research\.google\.com/github/([^/\s]+/[^/\s]+)/blob/", readme)
    for path in sorted(path for pattern in FILES for path in project.glob(pattern)):
        before = path.read_bytes().decode("utf-8")
        after = rewrite(before, badge[1] if badge else PLACEHOLDER, new)
        if after != before:
            path.write_bytes(after.encode("utf-8"))
            print(f"{path.relative_to(project)}: https://github.com/{new}")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1], *sys.argv[1:2])
