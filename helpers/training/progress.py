"""A progress bar that leaves one plain line behind.

In a notebook the bar is text that is replaced as the work goes on, and at the end by a
line such as "base: 100 steps, 15 s, loss=5.03": so a saved notebook shows what was done
and no bar that stands still. In a terminal it is tqdm's own.
"""

import sys
from typing import Any

from tqdm.std import tqdm


class Bar(tqdm):  # type: ignore[type-arg]
    """tqdm with another way to be shown in a notebook. Arguments are tqdm's."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.handle = None if more.get("disable") else _display()
        super().__init__(*args, **more)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar as it stands, or `msg`."""
        if self.handle is None:
            super().display(msg, pos)
            return
        text = str(self) if msg is None else msg
        self.handle.update({"text/plain": text}, raw=True)

    def close(self) -> None:
        """Take the bar away and leave a line."""
        if self.disable or self.handle is None:
            super().close()
            return
        self.display(self.last_line())
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]

    def last_line(self) -> str:
        """What was done, how long it took, and the numbers beside the bar."""
        done = f"{self.n:,} of {self.total:,}"
        if self.n == self.total:
            done = f"{self.n:,}"
        seconds = self.format_dict["elapsed"]
        parts = [f"{done} {self.unit}s", f"{seconds:.0f} s"]
        if self.postfix:
            parts.append(str(self.postfix))
        label = f"{self.desc.removesuffix(': ')}: " if self.desc else ""
        return label + ", ".join(parts)


def _display() -> Any:
    """A place in this cell's output that can be written again; None in a terminal."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    if not hasattr(get_ipython(), "kernel"):
        return None
    return display({"text/plain": ""}, raw=True, display_id=True)
