"What the tests of recipes share."

import pytest

from beit_nb import BeitError
from beit_nb.configs import check_recipe


def refusal(recipe):
    "The one line with which a recipe is refused."
    with pytest.raises(BeitError) as e:
        check_recipe(recipe)
    assert "\n" not in str(e.value)
    return str(e.value)
