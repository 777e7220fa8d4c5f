"""Pictures signed by C2PA: what the library c2pa says of them, what verify finds, and what stays the same."""

import io
import json
import sys
from datetime import UTC, datetime, timedelta

import bulkruns
import pytest
from basinescape import Guidance
from basinescape.bench.speed.standin import stand_in
from basinescape.data import signing
from basinescape.data.image_encoding import PICTURES, Encoder
from basinescape.data.prompts import Job
from basinescape.data.signing import Signer
from basinescape.data.verify import verify
from basinescape.runs.jsonl_journal import read_lines
from PIL import Image

c2pa = pytest.importorskip("c2pa")
JOBS = [Job(f"p{i}", "a cat", i) for i in range(3)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Files of a certificate and its key, by the kind of key: an authority of one's own has signed it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder, now = tmp_path_factory.mktemp("keys"), datetime.now(UTC)

    def built(name, public, authority):
        names = [x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, one)]) for one in (name, "root")]
        made = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(public)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(1))
        made = made.not_valid_after(now + timedelta(9)).add_extension(x509.BasicConstraints(authority, None), True)
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
        usage |= {"encipher_only": False, "decipher_only": False, "digital_signature": not authority}
        made = made.add_extension(x509.KeyUsage(**usage, key_cert_sign=authority, crl_sign=authority), True)
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
        return made.sign(root, hashes.SHA256()).public_bytes(Encoding.PEM)

    root, found = ec.generate_private_key(ec.SECP256R1()), {}
    above = built("root", root.public_key(), True)
    made = {"es256": ec.generate_private_key(ec.SECP256R1()), "es384": ec.generate_private_key(ec.SECP384R1())}
    made |= {"ed25519": ed25519.Ed25519PrivateKey.generate(), "ps256": rsa.generate_private_key(65537, 2048)}
    for kind, key in made.items():
        found[kind] = folder / f"{kind}.pem", folder / f"{kind}.key"
        found[kind][0].write_bytes(built(kind, key.public_key(), False) + above)
        found[kind][1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return found


def changed(data):
    """The same picture with one byte of its compressed pixels, its largest part, another one."""
    middle = len(data) * 3 // 4
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("kind", ["es256", "es384", "ed25519", "ps256"])
@pytest.mark.parametrize("format", PICTURES)
def test_a_signature_holds_and_is_broken_by_any_change(keys, format, kind):
    made = Encoder(format)(0, {"id": "a", "prompt": "a cat"}, Image.effect_noise((256, 256), 50).convert("RGB"))
    signed = Signer(*keys[kind], format)(made)
    assert signing.fault_of(signed.data, format) is None
    told = json.loads(c2pa.Reader(signing.media_type(format), io.BytesIO(signed.data)).json())
    (action,) = told["manifests"][told["active_manifest"]]["assertions"][0]["data"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert signing.fault_of(changed(signed.data), format) == (
        "has a C2PA manifest that does not hold: signingCredential.untrusted, assertion.dataHash.mismatch"
    )
    assert signing.fault_of(made.data, format).startswith("has no C2PA manifest")


def test_a_picture_that_cannot_be_signed_fails_alone(pipe, keys, tmp_path, monkeypatch):
    def refusing(self, data, title):
        if title == "p1":
            raise c2pa.C2paError("no room for a manifest")
        return sign(self, data, title)

    sign = Signer._sign
    monkeypatch.setattr(Signer, "_sign", refusing)
    bulkruns.make(stand_in(pipe), JOBS, tmp_path, Guidance.cfg(2.0), signer=Signer(*keys["es256"], "png"), steps=1)
    lines = {line["id"]: line for line in read_lines(tmp_path / "manifest.jsonl")}
    assert lines["p1"]["status"] == "failed: it cannot be signed: no room for a manifest" and "sha256" not in lines["p1"]
    assert lines["p0"]["status"] == lines["p2"]["status"] == "ok" and not (tmp_path / "images" / "p1.png").exists()


@pytest.mark.parametrize("format", ["png", "webdataset"])
def test_a_signed_run_keeps_its_digests_and_is_verified(pipe, keys, tmp_path, caplog, monkeypatch, format):
    if format == "webdataset":
        pytest.importorskip("webdataset")

    def make(out, **given):
        signer = Signer(*keys["es256"], format) if given.pop("sign", True) else None
        return bulkruns.make(stand_in(pipe), JOBS, out, Guidance.cfg(2.0), format=format, signer=signer, steps=1, **given)

    for name in ("one", "two"):
        make(tmp_path / name)
    make(tmp_path / "plain", sign=False)
    one, two, plain = (
        {line["id"]: line for line in read_lines(tmp_path / name / "manifest.jsonl")} for name in ("one", "two", "plain")
    )
    assert all(one[id]["sha256"] == two[id]["sha256"] == plain[id]["sha256"] for id in one)
    assert all(one[id]["signed_sha256"] != two[id]["signed_sha256"] for id in one)  # a signature has its own random numbers
    assert list(verify(tmp_path / "one")) == [] and make(tmp_path / "one").counts["ok"] == 0
    with pytest.raises(ValueError, match="c2pa_certificate"):
        make(tmp_path / "one", sign=False)
    if format == "png":  # an unsigned picture in the place of a signed one
        path = tmp_path / "one" / "images" / "p1.png"
        path.write_bytes((tmp_path / "plain" / "images" / "p1.png").read_bytes())
        lines = [line if line["id"] != "p1" else plain["p1"] for line in one.values()]
        (tmp_path / "one" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ((where, what),) = verify(tmp_path / "one")
        assert where == "images/p1.png" and what.startswith("has no C2PA manifest")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert list(verify(tmp_path / "two")) == [] and "is not looked at: C2PA needs the package c2pa-python" in caplog.text


@pytest.mark.parametrize("swap", ["another's key", "no key", "no certificate"])
def test_what_cannot_sign_is_refused_before_any_work(keys, swap):
    certificate, key = keys["es256"]
    pair = {"another's key": (certificate, keys["ed25519"][1]), "no key": (certificate,) * 2, "no certificate": (key,) * 2}[
        swap
    ]
    with pytest.raises(ValueError, match="no picture can be signed with"):
        Signer(*pair, "png")
    with pytest.raises(FileNotFoundError, match=r"c2pa_key 'gone\.pem' does not exist"):
        Signer(certificate, type(key)("gone.pem"), "png")
    with pytest.raises(ValueError, match="format is 'latents'"):
        Signer(certificate, key, "latents")
