"""What the tests of the app share: the models behind it, and a program that asks it."""

import pytest
from gradio_client import Client

from agl_trl.space.models import Models


@pytest.fixture(scope="session")
def models() -> Models:
    """The embedded models as on a Space, without a page."""
    return Models(hosted=True)


@pytest.fixture(scope="session")
def client(space_url) -> Client:
    return Client(space_url, verbose=False)
