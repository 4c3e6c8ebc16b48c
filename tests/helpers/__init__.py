"""What several tests use; no test is here."""

import pytest

pytest.register_assert_rewrite("helpers.commands", "helpers.files", "helpers.training")
