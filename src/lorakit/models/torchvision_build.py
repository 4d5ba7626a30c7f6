"""Whether torchvision, where it is installed, belongs to the torch that is.

transformers imports it with every model, and its own errors do not name it: PyPI's build, for GPUs,
beside a torch for processors is a common trouble ("operator torchvision::nms does not exist").
"""

import importlib
import importlib.util


def torchvision_trouble() -> str:
    """Why torchvision does not load, and the cure; empty where it does, or is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return ""
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return (
            f"torchvision does not load ({reason}): install the build that belongs to your torch, "
            "or uninstall it"
        )
    return ""
