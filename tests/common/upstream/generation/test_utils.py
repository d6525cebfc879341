"""What marks a tester of generating models. Its tests are not in the archive; tests/model has ours of `generate`."""


class GenerationTesterMixin:
    pass
