"""`tracker=none`, and what the other ranks hold in place of metrics: the same methods, so nobody asks which it is."""

from collections.abc import Mapping


class Nothing:
    """Takes what every tracker is given and does nothing with it."""

    def __init__(self, **given: object) -> None:
        pass

    def log(self, record: Mapping[str, float], step: int) -> None:
        pass

    def drop_after(self, step: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass
