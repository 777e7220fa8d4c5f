"""Marks a picture's file as made by a machine, and says with what: XMP, in the fields of IPTC's Photo Metadata.

Article 50(2) of the EU's AI Act (Regulation 2024/1689) asks for such a mark that machines can read. A packet holds no date, so
that a picture made again has the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image

from ..runs.environment import version_of
from ..runs.jsontext import json_bytes

# https://cv.iptc.org/newscodes/digitalsourcetype: made by a model that was trained on samples
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
XMP = "http://ns.adobe.com/xap/1.0/"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
OWN = "urn:basinescape:xmp#"
NAMES = {"Iptc4xmpExt": IPTC, "xmp": XMP, "basinescape": OWN}
SOURCE, PROMPT = "Iptc4xmpExt:DigitalSourceType", "Iptc4xmpExt:AIPromptInformation"
SETTINGS = ("seed", "negative_prompt", "steps", "scale", "guidance", "scheduler", "height", "width")  # of the manifest line
MOST = 65502  # bytes of a packet that a JPEG file can hold
NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def packet(line: Mapping[str, Any], prompt: bool = True) -> bytes:
    """Return the XMP of a picture, of at most MOST bytes.

    line: of the manifest. prompt: whether to include prompt, model and SETTINGS. They are also left out if they take too much
    room. A character that XML cannot hold becomes U+FFFD.
    """
    software = {SOURCE: TRAINED, "xmp:CreatorTool": f"basinescape {version_of('basinescape') or ''}".strip()}
    fields = {
        "Iptc4xmpExt:AISystemUsed": line.get("model"),
        "Iptc4xmpExt:AISystemVersionUsed": line.get("fingerprint"),
        PROMPT: line.get("prompt"),
        "basinescape:settings": json_bytes({name: line[name] for name in SETTINGS if name in line}).decode(),
    }
    whole = _packet(software | {name: value for name, value in fields.items() if value and prompt})
    return whole if len(whole) <= MOST else _packet(software)


def _packet(fields: Mapping[str, str]) -> bytes:
    spaces = "".join(f' xmlns:{name}="{uri}"' for name, uri in NAMES.items())
    texts = {name: escape(NO_XML.sub("\ufffd", value), {"\r": "&#13;"}) for name, value in fields.items()}
    inner = "".join(f"  <{name}>{text}</{name}>\n" for name, text in texts.items())
    text = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'  # as the XMP specification has it
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""{spaces}>\n'
        f'{inner}</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="r"?>'
    )
    return text.encode()


def fields_in(info: Mapping[Any, Any]) -> dict[str, str]:
    """Return the fields of a picture's XMP by the names in `packet`; empty if it has no XMP that can be read.

    info: the `info` of a Pillow image.
    """
    raw = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    data = raw.encode("utf-8", "replace") if isinstance(raw, str) else raw
    if b"<!" in data:  # no XMP declares entities, which could be made to fill the memory
        return {}
    try:
        tree = ElementTree.fromstring(data.strip(b"\0 \n\r\t"))
    except ElementTree.ParseError:
        return {}
    found: dict[str, str] = {}
    for about in tree.iter(f"{{{RDF}}}Description"):
        attributes = about.attrib.items()  # in which other programs write simple fields
        for name, value in [*attributes, *((one.tag, _text(one)) for one in about)]:
            for prefix, uri in NAMES.items():
                if name.startswith(f"{{{uri}}}"):
                    found[f"{prefix}:{name.partition('}')[2]}"] = value
    return found


def _text(field: ElementTree.Element) -> str:
    """Return the text of a field, which may be in a list of one."""
    return "".join(field.itertext()).strip() if len(field) else field.text or ""


def fault_of(data: bytes) -> str | None:
    """Return what is wrong with the mark of a picture's file; None if it says that a machine made it."""
    with Image.open(io.BytesIO(data)) as image:
        kind = fields_in(image.info).get(SOURCE)
    return (
        None
        if kind == TRAINED
        else f"is not marked as made by a machine: the DigitalSourceType in its XMP is {kind or 'missing'}"
    )
