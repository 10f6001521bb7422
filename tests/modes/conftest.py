"""A hook of the tests of modes."""


def pytest_runtest_setup(item):
    """Record the cell of the table that a test of a mode belongs to; `matrix.py` collects the cells."""
    mark, spec = item.get_closest_marker("mode"), getattr(item, "callspec", None)
    if mark is not None and spec is not None and "case" in spec.params:
        item.user_properties.append(("cell", (*mark.args, spec.params["case"].name)))
