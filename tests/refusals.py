"""Tables of wrong calls: each must raise the right error, and its message must say what is wrong."""

import re


def assert_refused(call, cases, prefix=""):
    """Check that `call(**arguments)` raises the error of each case, (arguments, error, message).

    The message begins with the prefix and the text of the case, in which "..." stands for any text.
    """
    for arguments, error, message in cases:
        found = None
        try:
            call(**arguments)
        except Exception as raised:
            found = raised
        pattern = prefix + re.escape(message).replace(re.escape("..."), ".*")
        assert isinstance(found, error) and re.match(pattern, str(found)), f"{message}: {found!r}"
