"""Writes C2PA manifests into pictures: they say that a machine made it, signed with the user's certificate by the library c2pa.

See https://spec.c2pa.org. The bytes of a signed picture differ each time, because a C2PA manifest holds random numbers. So a
line of the run's manifest has two digests: `sha256`, of the picture before it is signed, is the same when it is made again;
`signed_sha256` is that of the signed file. No authority's time stamp is requested, because that needs the network.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..runs.environment import library, version_of
from .image_encoding import Encoder, Made, media_type
from .xmp import TRAINED

CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}  # a key's curve -> C2PA's name of the algorithm
SOUND = ("Valid", "Trusted")  # the library's states; Trusted: signed by somebody on its trust list

SETTINGS = {  # of the library: no thumbnails, because they may be larger than the picture, and no network
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False},
}


class Signer:
    """Signs pictures of a format.

    certificate: a PEM file with the certificate, followed by those above it. key: a PEM file with its private key, without a
    password. settings: the signer's field of run.json, the certificate's SHA-256.

    Raises FileNotFoundError for a missing file, ImportError without the package c2pa-python, ValueError for a format without
    pictures, or if no picture can be signed with these files.
    """

    def __init__(self, certificate: Path, key: Path, format: str):
        self._c2pa = c2pa_library()
        if format == "latents":
            raise ValueError("c2pa_certificate signs pictures, and format is 'latents': leave one of them out")
        for name, path in (("c2pa_certificate", certificate), ("c2pa_key", key)):
            if not path.is_file():
                raise FileNotFoundError(f"{name} {str(path)!r} does not exist")
        self._type = media_type(format)
        self.settings = {"c2pa_certificate": hashlib.sha256(certificate.read_bytes()).hexdigest()}
        trial = Encoder(format).picture(Image.new("RGB", (8, 8)), {})
        try:
            info = self._c2pa.C2paSignerInfo(_algorithm(key.read_bytes()), certificate.read_bytes(), key.read_bytes(), None)
            self._signer = self._c2pa.Signer.from_info(info)
            self._sign(trial, "")
        except (self._c2pa.C2paError, ValueError, TypeError) as error:
            raise ValueError(
                f"no picture can be signed with {str(certificate)!r} and {str(key)!r}: {error}; C2PA needs the certificate of "
                "an end entity with the key usage digitalSignature, followed by the one that signed it"
            ) from error

    def __call__(self, made: Made) -> Made:
        """Return the same with its picture signed."""
        if made.data is None:
            return made
        data = self._sign(made.data, made.line["id"])
        line = made.line | {"signed_sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        return replace(made, line=line, data=data)

    def _sign(self, data: bytes, title: str) -> bytes:
        agent = {"name": "basinescape", "version": version_of("basinescape") or "unknown"}
        action = {"action": "c2pa.created", "digitalSourceType": TRAINED, "softwareAgent": agent}
        manifest = {
            "claim_generator_info": [agent],
            "title": title,
            "format": self._type,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        self._c2pa.Builder(manifest, _context(self._c2pa)).sign(self._signer, self._type, io.BytesIO(data), signed)
        return signed.getvalue()


def c2pa_library() -> Any:
    """Raises ImportError where the package c2pa-python is missing."""
    return library("c2pa", "C2PA needs", "c2pa-python", "'basinescape[provenance]'")


def fault_of(data: bytes, format: str) -> str | None:
    """Return what is wrong with the C2PA manifest of a picture in a run of this format; None if its signature is valid.

    This does not check who owns the certificate, nor whether they can be trusted.
    """
    c2pa = c2pa_library()
    try:
        found = json.loads(c2pa.Reader(media_type(format), io.BytesIO(data), context=_context(c2pa)).json())
    except c2pa.C2paError as error:
        return f"has no C2PA manifest that can be read: {error}"
    if found.get("validation_state") in SOUND:
        return None
    codes = ", ".join(dict.fromkeys(status["code"] for status in found.get("validation_status", ())))
    return f"has a C2PA manifest that does not hold: {codes}"


def _context(c2pa: Any) -> Any:
    return c2pa.Context(c2pa.Settings.from_dict(SETTINGS))


def _algorithm(key: bytes) -> str:
    """Return C2PA's name of the algorithm of a private key. Raises ValueError or TypeError for another kind of key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    found = load_pem_private_key(key, password=None)
    if isinstance(found, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(found, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(found, ec.EllipticCurvePrivateKey) and found.curve.name in CURVES:
        return CURVES[found.curve.name]
    raise ValueError(f"its key must be Ed25519, RSA or on one of the curves {', '.join(CURVES)}")
