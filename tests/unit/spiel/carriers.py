"""What methods are tested with instead of a model."""


class NoCarrier:
    """A carrier whose deltas are in no weight."""

    def write(self) -> None: ...

    def release(self, *deltas) -> None: ...

    def adopt(self, *deltas) -> None: ...
