"""The zoo: every architecture that the recorder is held against."""

import zoo_libraries
import zoo_own
import zoo_timm
import zoo_torch
import zoo_transformers
import zoo_transformers_more
import zoo_transformers_rest
from zoo_case import Case

CASES: tuple[Case, ...] = (
    *zoo_torch.CASES,
    *zoo_transformers.CASES,
    *zoo_transformers_more.CASES,
    *zoo_transformers_rest.CASES,
    *zoo_timm.CASES,
    *zoo_libraries.CASES,
    *zoo_own.CASES,
)
