"""`GET /models` and `GET /models/{id}`: the cards, in OpenAI's words and ours."""

from trivec.api.answers import Answer, json_answer
from trivec.api.questions import output_words
from trivec.api.schemas import Model, ModelList
from trivec.api.shelf import Shelf
from trivec.api.visit import Visit
from trivec.core.types import ModelCard
from trivec.settings import HttpLimits


class Models:
    """A key sees the models it may use."""

    def __init__(self, shelf: Shelf, limits: HttpLimits) -> None:
        self._shelf = shelf
        self._limits = limits

    async def list(self, visit: Visit) -> Answer:
        assert visit.caller is not None, "the route is not open"
        cards = self._shelf.cards_for(visit.caller)
        truncate = visit.caller.truncate or self._limits.truncate
        return json_answer(ModelList(data=[_model(card, card.id, truncate) for card in cards]))

    async def show(self, visit: Visit) -> Answer:
        assert visit.caller is not None, "the route is not open"
        name = visit.path_params["id"]
        truncate = visit.caller.truncate or self._limits.truncate
        return json_answer(_model(self._shelf.find(name, visit).card, name, truncate))


def _model(card: ModelCard, name: str, truncate: str) -> Model:
    return Model(
        id=name,
        created=card.created,
        owned_by=card.owned_by,
        context_size=card.token_count_max,
        dimensions=card.dimensions,
        dimensions_selectable=card.dimensions_selectable,
        output_types=output_words(card.outputs),
        truncate=truncate,
        precision=card.precision,
        recipe=card.recipe,
        verified=card.verified,
        aliases=list(card.aliases),
        notes=dict(card.notes),
    )
