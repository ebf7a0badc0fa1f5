"""The screen of kvtop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import DataTable, Footer, Input, Static

from kvcached.cli.edge import one_line
from kvcached.cli.top import text
from kvcached.cli.top.rates import ORDERS, DeviceView, Line, Looks, ordered
from kvcached.errors import KvcachedError
from kvcached.observe import Observer

SetLimit = Callable[[str, str, str], str]
"""Device, instance, limit as people write it: what that has done, in words."""

_STYLES = {
    text.IN_USE: "green",
    text.CACHED: "yellow",
    text.WARM: "blue",
    text.FREE: "dim",
    text.LIMIT: "bold red",
    text.GUARANTEE: "bold cyan",
}
_KEY = "█ in use ▓ cached ▒ warm ┃ limit ╎ guarantee"


class KvTop(App[None]):
    """Devices and instances, looked at again and again."""

    TITLE = "kvtop"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { height: 1; text-style: bold; }
    #spark { height: 1; color: $accent; }
    #said { height: 1; color: $text-muted; }
    #ask { height: 1; border: none; padding: 0; display: none; }
    #ask.shown { display: block; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("s", "sort", "sort"),
        Binding("slash", "ask('filter')", "filter"),
        Binding("l", "ask('limit')", "limit"),
        Binding("d", "device", "device"),
        Binding("escape", "leave", "", show=False),
    ]

    def __init__(self, observer: Observer, interval_s: float, set_limit: SetLimit) -> None:
        super().__init__()
        self._observer, self._interval_s, self._set_limit = observer, interval_s, set_limit
        self._looks = Looks()
        self._views: list[DeviceView] = []
        self._device = 0
        self._order, self._wanted = ORDERS[0], ""
        self._asks = ""
        self._bar_width = 0
        self._shown: dict[str, tuple[str, ...]] = {}

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(id="title", markup=False)
            yield Static(id="spark", markup=False)
            yield DataTable(
                id="table",
                cell_padding=0,
                cursor_type="row",
                cursor_foreground_priority="renderable",
            )
            yield Static(id="said", markup=False)
            yield Input(id="ask", select_on_focus=False)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self._set_columns()
        self._say(_KEY)
        self.look()
        self.set_interval(self._interval_s, self.look)
        self._table.focus()

    def on_resize(self) -> None:
        if self._bar_width != self._wanted_bar_width():
            self._set_columns()
            self._show()

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#table", DataTable)

    def _say(self, words: str) -> None:
        self.query_one("#said", Static).update(words)

    def _wanted_bar_width(self) -> int:
        return max(8, text.COLUMNS[1][1] + self.size.width - text.WIDTH)

    def _set_columns(self) -> None:
        self._bar_width = self._wanted_bar_width()
        self._table.clear(columns=True)
        self._shown = {}
        for heading in text.headings(self._bar_width):
            self._table.add_column(heading, key=heading.strip(), width=len(heading))

    def look(self) -> None:
        """Reads the ledgers and shows what has changed."""
        self._views = self._looks.take(self._observer.read(), time.monotonic())
        if self._observer.problems:
            self._say(one_line("; ".join(self._observer.problems.values())))
        self._show()

    def _view(self) -> DeviceView | None:
        if not self._views:
            return None
        self._device %= len(self._views)
        return self._views[self._device]

    def _show(self) -> None:
        view = self._view()
        if view is None:
            self.query_one("#title", Static).update("no engine shares a device here")
            self.query_one("#spark", Static).update("")
            lines: list[Line] = []
        else:
            place = f"  [{self._device + 1}/{len(self._views)}]" if len(self._views) > 1 else ""
            self.query_one("#title", Static).update(text.title(view) + place)
            self.query_one("#spark", Static).update(text.spark(view, self.size.width))
            lines = ordered(view.lines, self._order, self._wanted)
        self._show_rows({line.account.instance: line for line in lines})

    def _show_rows(self, lines: dict[str, Line]) -> None:
        """Changes only the cells that differ: nothing flickers, also over a slow line."""
        table = self._table
        cells = {key: text.cells(line, self._bar_width) for key, line in lines.items()}
        if list(cells) != list(self._shown):
            chosen = self._chosen()
            table.clear()
            for key, row in cells.items():
                table.add_row(*map(_coloured, row), key=key)
            if chosen in cells:
                table.move_cursor(row=table.get_row_index(chosen))
        else:
            columns = [name for name, _ in text.COLUMNS]
            for key, row in cells.items():
                for column, cell, old in zip(columns, row, self._shown[key], strict=True):
                    if cell != old:
                        table.update_cell(key, column, _coloured(cell))
        self._shown = cells

    def _chosen(self) -> str:
        """The instance under the cursor; empty where there is none."""
        keys = list(self._shown)
        row = self._table.cursor_row
        return keys[row] if 0 <= row < len(keys) else ""

    def action_sort(self) -> None:
        """The next order."""
        self._order = ORDERS[(ORDERS.index(self._order) + 1) % len(ORDERS)]
        self._say(f"sorted by {self._order}")
        self._show()

    def action_device(self) -> None:
        """The next device."""
        self._device += 1
        self._show()

    def action_ask(self, what: str) -> None:
        """Asks for a filter, or for a limit of the instance under the cursor."""
        if what == "limit" and not self._chosen():
            return
        self._asks = what
        field = self.query_one("#ask", Input)
        field.placeholder = "names that hold" if what == "filter" else "limit: 20GiB, 40% or none"
        field.value = self._wanted if what == "filter" else ""
        field.add_class("shown")
        field.focus()

    def action_leave(self) -> None:
        """Back to the table."""
        self.query_one("#ask", Input).remove_class("shown")
        self._table.focus()

    def on_input_submitted(self, message: Input.Submitted) -> None:
        value = message.value.strip()
        self.action_leave()
        if self._asks == "filter":
            self._wanted = value
            self._say(f"names that hold {value!r}" if value else _KEY)
        elif value:
            self._change_limit(value)
        self.look()

    def _change_limit(self, value: str) -> None:
        view, instance = self._view(), self._chosen()
        if view is None or not instance:
            return
        try:
            self._say(self._set_limit(view.ledger.device, instance, value))
        except KvcachedError as error:
            self._say(one_line(str(error)))


def _coloured(cell: str) -> Text:
    """A bar in colours; anything else as it is."""
    found = Text(cell, no_wrap=True)
    if cell.strip() and all(char in _STYLES or char == " " for char in cell):
        for index, char in enumerate(cell):
            if char in _STYLES:
                found.stylize(_STYLES[char], index, index + 1)
    return found
