"""The served models, by id and by alias."""

from collections.abc import Iterable, Mapping

from trivec.accounts import Caller
from trivec.api.questions import TOKENS_MIN
from trivec.api.reading import shown
from trivec.api.visit import Visit
from trivec.core.errors import BusyError, ModelUnknown
from trivec.core.ports import Embedder
from trivec.core.types import ModelCard


class Shelf:
    """Finds the embedder that a client named, if its key may use it."""

    def __init__(self, embedders: Mapping[str, Embedder]) -> None:
        self._embedders = embedders
        self._cards = {one.card.id: one.card for one in embedders.values()}

    def find(self, name: str, visit: Visit) -> Embedder:
        """The model called *name*, case and all. Raises `ModelUnknown`, `ModelDenied`."""
        assert visit.caller is not None, "models are for callers whose key is known"
        embedder = self._embedders.get(name)
        if embedder is None:
            served = tuple(card.id for card in self.cards_for(visit.caller))
            raise ModelUnknown(model=shown(name), served=served)
        visit.model = embedder.card.id
        visit.caller.require_model(embedder.card.names)
        return embedder

    def check_admission(self) -> None:
        """Raise `Overloaded` when no model has room for even the smallest request there is."""
        refusal: BusyError | None = None
        for embedder in self._embedders.values():
            try:
                embedder.check_admission(TOKENS_MIN)
            except BusyError as busy:
                refusal = busy
            else:
                return
        if refusal is not None:
            raise refusal

    def cards_for(self, caller: Caller) -> list[ModelCard]:
        """The cards of the models that *caller* may use, in the order they were configured."""
        return [card for card in self._cards.values() if caller.may_use(card.names)]

    def warnings_of(self, models: Iterable[str]) -> list[str]:
        """A line for each name of a key's *models* that no model is served under."""
        served = ", ".join(self._cards) or "nothing"
        return [
            f"No model called {shown(name)} is served here (served: {served}); the key opens it "
            "once one is."
            for name in sorted(models)
            if name not in self._embedders
        ]
