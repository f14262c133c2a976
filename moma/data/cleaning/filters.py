"""Filters that look at one document: a user's function, languages, evaluation texts, image sizes.

Images are checked when they are read, so that they are read once only.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from importlib.metadata import version
from typing import Any

from PIL import Image

from moma.data.cleaning.config import CleaningConfig
from moma.data.cleaning.evaluation import EvaluationTexts, evaluation_fingerprint, text_of
from moma.data.cleaning.functions import function_fingerprint, load_function
from moma.data.documents import Document, DroppedImageError, ImageRef, Rejected
from moma.data.encode.chunks import reject_unencodable
from moma.errors import UserError, list_names

# A language is recognized by the first characters of a document.
LANGUAGE_CHARACTERS = 2000
# Each filter's keys; the first one turns it on.
_KEYS = {
    "function": ("function",),
    "min_image_side": ("min_image_side",),
    "max_aspect_ratio": ("max_aspect_ratio",),
    "languages": ("languages", "min_language_probability"),
    "evaluation_files": ("evaluation_files", "evaluation_ngram", "evaluation_overlap"),
}

Check = Callable[[Document], Document | Rejected]


def filters_fingerprint(config: CleaningConfig) -> str:
    """Return a value that changes with what the filters of a source do; empty without filters."""
    values = config.model_dump(mode="json")
    used: dict[str, Any] = {
        key: values[key] for name, keys in _KEYS.items() if values[name] for key in keys
    }
    if not used:
        return ""
    if config.function is not None:
        used["function"] = function_fingerprint(config.function)
    if config.languages:
        used["package"] = package_version("languages", "py3langid")
    used["evaluated"] = [evaluation_fingerprint(path) for path in config.evaluation_files]
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()[:16]


def package_version(key: str, package: str) -> str:
    """Return a package's version, on which what a key of `clean` drops may depend.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version(package)
    except ImportError as error:
        raise missing_package(key, error) from error


def make_filter(config: CleaningConfig) -> Check:
    """Return what filters one document of a source; models are loaded once in a process.

    A document that is dropped becomes `Rejected`, with the key that drops it. An image that is too
    small or too long raises `DroppedImageError` when it is read.

    Raises:
        UserError: a package is missing, or an evaluation file cannot be read.
    """
    return _make_filter(config, filters_fingerprint(config))


@lru_cache(maxsize=64)
def _make_filter(config: CleaningConfig, fingerprint: str) -> Check:
    """See `make_filter`; files of the same names may have changed, which the fingerprint shows."""
    steps: list[Check] = []
    if config.function is not None:
        steps.append(partial(_apply_function, load_function(config.function)))
    if config.languages:
        languages = frozenset(config.languages)
        arguments = _load_languages(languages), languages, config.min_language_probability
        steps.append(partial(_check_language, *arguments))
    if config.evaluation_files:
        ngram, overlap = config.evaluation_ngram, config.evaluation_overlap
        texts = EvaluationTexts(config.evaluation_files, ngram, overlap)
        steps.append(partial(_check_evaluation, texts))
    if config.checks_images:
        sizes = config.min_image_side or 1, config.max_aspect_ratio
        steps.append(partial(_check_images, *sizes))

    def apply(document: Document) -> Document | Rejected:
        result = reject_unencodable(document)
        for step in steps:
            if isinstance(result, Rejected):
                break
            result = reject_unencodable(step(result))
        return result

    return apply


def drop(document: Document, key: str, reason: str) -> Rejected:
    """Return a document as dropped by a key of `clean`."""
    return Rejected(document.row or document.name, f"clean.{key}: {reason}", key)


def _apply_function(
    function: Callable[[Document], Document | str], document: Document
) -> Document | Rejected:
    result = function(document)
    return drop(document, "function", result) if isinstance(result, str) else result


@cache
def _identifier() -> Any:
    """Return the model that recognizes languages, 5 MB that take a second to load."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise missing_package("languages", error) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _load_languages(languages: frozenset[str]) -> Callable[[str], tuple[str, float]]:
    identifier = _identifier()
    if unknown := languages - {*identifier.labels}:
        known = ", ".join(sorted(identifier.labels))
        raise UserError(f"clean.languages: unknown {list_names(sorted(unknown))}; known: {known}")
    classify: Callable[[str], tuple[str, float]] = identifier.classify
    return classify


def _check_language(
    classify: Callable[[str], tuple[str, float]],
    languages: frozenset[str],
    min_probability: float,
    document: Document,
) -> Document | Rejected:
    text = text_of(document)
    if not text.strip():
        return document
    language, probability = classify(text[:LANGUAGE_CHARACTERS])
    if language in languages and probability >= min_probability:
        return document
    return drop(document, "languages", f"its language is {language} ({probability:.0%})")


def _check_evaluation(texts: EvaluationTexts, document: Document) -> Document | Rejected:
    location = texts.find(text_of(document))
    return (
        document
        if location is None
        else drop(document, "evaluation_files", f"it contains {location}")
    )


def _check_images(min_side: int, max_ratio: float | None, document: Document) -> Document:
    segments = [
        part
        if isinstance(part, str)
        else replace(part, read=partial(_read_checked, part, min_side, max_ratio))
        for part in document.segments
    ]
    return replace(document, segments=tuple(segments))


def _read_checked(image: ImageRef, min_side: int, max_ratio: float | None) -> Image.Image:
    found = image.read()
    width, height = found.size
    if min(width, height) < min_side:
        reason = f"{width} × {height} pixels, at least {min_side} on each side"
        raise DroppedImageError(image.name, reason, "min_image_side")
    if max_ratio is not None and max(width, height) > max_ratio * min(width, height):
        reason = f"{width} × {height} pixels, at most {max_ratio:g} : 1"
        raise DroppedImageError(image.name, reason, "max_aspect_ratio")
    return found


def missing_package(key: str, error: ImportError) -> UserError:
    """Return the error about a package that a key of `clean` needs."""
    return UserError(f"clean.{key}: needs {error.name}; install it with pip install 'moma[clean]'")
