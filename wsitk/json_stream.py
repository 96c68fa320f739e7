"""GeoJSON read feature by feature: memory follows the largest feature, not the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, final

from wsitk.errors import SourceError

__all__ = ["JsonReader", "open_text", "features"]

_PIECE = 1 << 20
_LARGEST = 1 << 28  # characters of one value: beyond this the file is no list of objects


def open_text(file: Path) -> TextIO:
    """Open a text file in UTF-8, through gzip if its name says so."""
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8")
    return open(file, encoding="utf-8")


@final
class JsonReader:
    """Takes JSON values one by one from a stream, holding only the one it is at.

    Raises SourceError (WSI190) where the text is not JSON.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._done = False

    def _more(self) -> bool:
        if self._done:
            return False
        piece = self._stream.read(max(_PIECE, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        self._done = not piece
        return bool(piece)

    def peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n\ufeff":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Consume one character out of `wanted`."""
        found = self.peek()
        if not found or found not in wanted:
            raise SourceError(
                "WSI190", f"expected one of {wanted!r}, found {found or 'the end of the file'!r}"
            )
        self._at += 1
        return found

    def value(self) -> Any:
        """Consume one whole value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at < _LARGEST and self._more():
                    continue
                near = self._text[error.pos : error.pos + 20]
                raise SourceError("WSI190", f"no JSON: {error.msg} near {near!r}") from error
            # a number at the end of the piece may go on in the next one
            if end == len(self._text) and self._more():
                continue
            self._at = end
            return value


def features(reader: JsonReader) -> Iterator[Any]:
    """Yield the features of a file in any of the forms that QuPath takes: collection, list, or just one.

    Raises SourceError: WSI190 where the text is not JSON, WSI191 if it is no collection of features.
    """
    start = reader.peek()
    if start == "[":
        yield from _elements(reader)
    elif start == "{":
        yield from _members(reader)
    else:
        raise SourceError("WSI191", f"starts with {start!r}; wanted a FeatureCollection, a Feature or a list")
    if reader.peek():
        raise SourceError("WSI190", "there is more text after the end of the collection")


def _elements(reader: JsonReader) -> Iterator[Any]:
    """Yield the elements of the array that begins here."""
    reader.take("[")
    if reader.peek() == "]":
        reader.take("]")
        return
    while True:
        yield reader.value()
        if reader.take(",]") == "]":
            return


def _members(reader: JsonReader) -> Iterator[Any]:
    """Yield the features of the object that begins here: its `features`, or itself."""
    whole: dict[str, Any] = {}
    streamed = False
    reader.take("{")
    if reader.peek() == "}":
        reader.take("}")
    else:
        while True:
            key = reader.value()
            reader.take(":")
            if key == "features" and reader.peek() == "[":
                streamed = True
                yield from _elements(reader)
            else:
                whole[str(key)] = reader.value()
            if reader.take(",}") == "}":
                break
    kind = whole.get("type")
    if streamed and kind != "FeatureCollection":
        raise SourceError("WSI191", f"type is {kind!r}, wanted 'FeatureCollection': QuPath ignores the file")
    if not streamed and kind == "FeatureCollection":
        raise SourceError("WSI191", "a FeatureCollection without a list of features")
    if not streamed:
        yield whole
