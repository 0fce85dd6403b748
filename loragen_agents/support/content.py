"""Where the folders that a user edits without touching code are: tool registries, prompt templates, training recipes.

They stand at the top of a source checkout; a wheel ships them inside the package. Knows nothing of what is in them.
"""

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parents[1]

ContentName = Literal["tools", "prompts", "training"]


def content_folder(name: ContentName) -> Path:
    """Return the folder `name` of the checkout or, in an installed wheel, of the package.

    Raises:
        FileNotFoundError: neither layout holds the folder, so the installation is incomplete.
    """
    # The wheel's copy comes first: beside an installed package ("site-packages/tools") stands somebody else's folder.
    shipped = _PACKAGE / "_content" / name
    if shipped.is_dir():
        return shipped
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise FileNotFoundError(
        f"the folder {name!r} of loragen-agents is missing (looked in {shipped} and {checkout / name}); "
        "install the package again"
    )
