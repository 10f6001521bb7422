"""Tables of wrong calls: each must raise the right error, and its message must say what is wrong."""

import re


def assert_refused(call, cases, prefix=""):
    """Check that `call(**arguments)` raises the error of each case, with a message that begins as prefix + message."""
    for case, (arguments, error, message) in cases.items():
        found = None
        try:
            call(**arguments)
        except Exception as raised:
            found = raised
        assert isinstance(found, error) and re.match(prefix + message, str(found)), f"{case}: {found!r}"
