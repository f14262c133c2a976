"""The section `clean` of a source."""

from pydantic import Field, model_validator

from moma.recipe import Config, RequiredPath

# The keys that compare documents with each other.
COMPARED_KEYS = (
    "duplicate_texts",
    "near_duplicate_texts",
    "duplicate_images",
    "near_duplicate_images",
)

# Keys without effect unless another one is set.
_NEEDS = {
    "min_language_probability": "languages",
    "evaluation_ngram": "evaluation_files",
    "evaluation_overlap": "evaluation_files",
    "near_duplicate_ngram": "near_duplicate_texts",
}


class CleaningConfig(Config):
    """Which documents and images of a source are dropped; by default none.

    Attributes:
        function: name of a function that a package registers in the entry-point group
            `moma.cleaning`; before all other keys, it keeps, changes or drops each document.
        min_image_side: minimum pixels of an image's shorter side.
        max_aspect_ratio: maximum ratio of an image's longer side to its shorter side.
        languages: codes of languages such as `en`; documents in others are dropped, those without
            text are not.
        min_language_probability: a document whose language has a lower probability is dropped.
        evaluation_files: what models are evaluated on, as `moma evaluate --from` names it;
            documents that contain these texts are dropped.
        evaluation_ngram: words of the n-grams by which these texts are found.
        evaluation_overlap: fraction of an evaluation text's n-grams that a dropped document has.
        duplicate_texts: whether documents are dropped whose text an earlier document has.
        near_duplicate_texts: Jaccard similarity of the n-grams of a dropped document and an
            earlier one, as MinHash estimates it.
        near_duplicate_ngram: words of these n-grams.
        duplicate_images: whether images are dropped that an earlier document has.
        near_duplicate_images: maximum number of bits, of 64, in which the perceptual hashes of a
            dropped image and one of an earlier document differ.
    """

    function: str | None = Field(default=None, min_length=1)
    min_image_side: int | None = Field(default=None, ge=1)
    max_aspect_ratio: float | None = Field(default=None, ge=1)
    languages: tuple[str, ...] = ()
    min_language_probability: float = Field(default=0, ge=0, le=1)
    evaluation_files: tuple[RequiredPath, ...] = ()
    evaluation_ngram: int = Field(default=13, ge=1, le=1000)
    evaluation_overlap: float = Field(default=0.5, gt=0, le=1)
    duplicate_texts: bool = False
    near_duplicate_texts: float | None = Field(default=None, ge=0.5, le=1)
    near_duplicate_ngram: int = Field(default=5, ge=1, le=1000)
    duplicate_images: bool = False
    near_duplicate_images: int | None = Field(default=None, ge=0, le=16)

    @model_validator(mode="after")
    def _check_effects(self) -> "CleaningConfig":
        for key, needed in _NEEDS.items():
            # The recipe of a run has all keys, with their defaults.
            is_default = getattr(self, key) == type(self).model_fields[key].default
            if not is_default and not getattr(self, needed):
                raise ValueError(f"{key} has no effect without {needed}; add that, or leave it out")
        return self

    @property
    def compares_texts(self) -> bool:
        """Whether documents are compared by their texts."""
        return self.duplicate_texts or self.near_duplicate_texts is not None

    @property
    def compares_images(self) -> bool:
        """Whether documents are compared by their images."""
        return self.duplicate_images or self.near_duplicate_images is not None

    @property
    def checks_images(self) -> bool:
        """Whether a filter looks at the size of images."""
        return self.min_image_side is not None or self.max_aspect_ratio is not None
