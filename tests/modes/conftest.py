"""Each test of a mode tells which cell of the table it belongs to, wherever it runs: `matrix.py` collects them."""


def pytest_runtest_setup(item):
    mark, spec = item.get_closest_marker("mode"), getattr(item, "callspec", None)
    if mark is not None and spec is not None and "case" in spec.params:
        item.user_properties.append(("cell", (*mark.args, spec.params["case"].name)))
