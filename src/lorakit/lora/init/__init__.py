"""First values of an adapter: one file an initialisation, and the registry that names them.

Pure functions from tensors to factors, which know neither layers nor configurations.
"""

from lorakit.lora.init import (  # each registers what it has
    corda,
    eva,
    from_weight,
    loftq,
    lora_ga,
    random_factors,
)
from lorakit.lora.init.initialization import (
    PREPARED,
    ChosenInit,
    DataPass,
    Factors,
    InitialFactors,
    Initialization,
    InitSite,
    as_settings,
    find,
    register,
    registered,
)

__all__ = [
    "PREPARED",
    "ChosenInit",
    "DataPass",
    "Factors",
    "InitSite",
    "InitialFactors",
    "Initialization",
    "as_settings",
    "corda",
    "eva",
    "find",
    "from_weight",
    "loftq",
    "lora_ga",
    "random_factors",
    "register",
    "registered",
]
