"""A class names its argument; the command line shows the key."""

import pytest

from sturdy.errors import ConfigError, add_key, as_config_error


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("fold=6 is none of folds=5", "data.fold=6 is none of data.folds=5"),
        ("'root=\"/my data\"' has images", "'data.root=\"/my data\"' has images"),
        ("data.root=/fold=3/x and other=1", "data.root=/fold=3/x and other=1"),
        ("a\n  root=/x  3 images", "a\n  data.root=/x  3 images"),
    ],
)
def test_the_key_is_put_in_front_of_arguments(message, shown):
    assert add_key(message, "data", ["fold", "folds", "root"]) == shown
    with pytest.raises(ConfigError) as error, as_config_error("data", ["fold", "folds", "root"]):
        raise ValueError(message)
    assert str(error.value) == shown
