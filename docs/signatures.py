"""Extension of griffe, which reads the signatures of the reference: show each option of `**options: Unpack[...]`."""

import inspect

import griffe


class Options(griffe.Extension):
    def on_function(self, *, func, **kwargs):
        if "options" not in func.parameters or not str(func.parameters["options"].annotation).startswith("Unpack["):
            return
        del func.parameters["options"]
        # By the signature at run time, which has the defaults.
        for each in inspect.signature(griffe.dynamic_import(func.path)).parameters.values():
            if each.name not in func.parameters:
                func.parameters.add(
                    griffe.Parameter(
                        each.name,
                        annotation=inspect.formatannotation(each.annotation).replace("collections.abc.", ""),
                        kind=griffe.ParameterKind.keyword_only,
                        default=repr(each.default),
                    )
                )
