"""Where the models that come with the package lie."""

from pathlib import Path

_FOLDERS = {
    "color-digits-sana": "color_digits_sana",
    "color-digits-sd3": "color_digits_sd3",
    "color-digits-pixart": "color_digits_pixart",
    "color-digits-flux": "color_digits_flux",
    "color-digits-classifier": "color_digits_classifier",
    "espeak-speecht5": "espeak_speecht5",
    "topics-gemma2": "topics_gemma2",
}


def zoo_path(name: str) -> Path:
    """Finds the folder of an embedded model.

    Args:
        name: one of the names above, such as "color-digits-sana" (a diffusers pipeline) or "color-digits-classifier".

    Returns:
        The folder.

    Raises:
        ValueError: when there is no such model, or its folder is missing from the installation.
    """
    if name not in _FOLDERS:
        raise ValueError(f"name is {name!r}; allowed are {', '.join(_FOLDERS)}. Pass one of them.")
    folder = Path(__file__).parent / _FOLDERS[name]
    if not folder.is_dir():
        raise ValueError(
            f"name is {name!r} but its folder {folder} is missing; allowed is an installation with the zoo's data "
            "files. Reinstall the package."
        )
    return folder
