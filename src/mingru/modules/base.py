"""What all layers share: a call with arguments that don't fit is refused in their own name."""

import inspect
from typing import Any

from torch import nn

from ..check import misfit


class Base(nn.Module):
    """A module whose call names the class and the argument that is meant, where Python would name neither."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except TypeError as error:
            # Asked after the fact, as hooks may take and give other arguments; and only then does it cost anything.
            if "forward() " not in str(error):
                raise
            signature = inspect.signature(type(self).forward)
            problem = misfit(self.name, signature, (self, *args), kwargs)
            if not problem:
                raise
            raise TypeError(problem) from None
