"""The warning filters of pyproject.toml."""

import warnings

import pytest


def warn_in(module: str) -> list:
    """Warn from a line of `module`; return what was recorded, under the filters of this suite."""
    with warnings.catch_warnings(record=True) as recorded:
        exec("import warnings; warnings.warn('seen', FutureWarning)", {"__name__": module})
    return recorded


@pytest.mark.parametrize("module", ["mlx_dsv3", "mlx_dsv3.model.moe", "convert.run", "chat"])
def test_a_warning_that_our_code_causes_is_an_error(module):
    """A cast that overflows in our code and passes as a line of the summary."""
    with pytest.raises(FutureWarning, match="seen"):
        warn_in(module)


@pytest.mark.parametrize("module", ["transformers.cache_utils", "chatter", "parity.oracle"])
def test_a_warning_of_another_package_is_no_error(module):
    """transformers 5.24 deprecated one argument, and 50 tests failed on code that was right."""
    assert [str(each.message) for each in warn_in(module)] == ["seen"]
