"""A condition is dropped, doubled, cut and handed to the backbone in one place."""

import torch

from sturdy.diffusion import ClassCondition

LABEL = torch.tensor([0, 1, 2, 1])
AUGMENTATION = torch.arange(8.0).reshape(4, 2)


def test_dropping_puts_the_null_label_and_keeps_the_augmentation():
    cond = ClassCondition(LABEL, 3, AUGMENTATION)
    label, augmentation = cond.drop(torch.tensor([True, False, False, True])).arguments()
    assert label.tolist() == [3, 1, 2, 3]
    assert augmentation is AUGMENTATION
    assert cond.arguments()[0] is LABEL, "the condition itself was changed"
    assert cond.null().arguments()[0].tolist() == [3, 3, 3, 3]


def test_the_backbone_gets_no_label_without_classes_and_no_augmentation_without_one():
    assert ClassCondition(LABEL, 3).arguments() == (LABEL,)
    assert ClassCondition(LABEL, 0).arguments() == (None,)
    assert ClassCondition(LABEL, 0, AUGMENTATION).arguments() == (None, AUGMENTATION)


def test_parts_put_together_again_are_the_condition():
    cond = ClassCondition(LABEL, 3, AUGMENTATION)
    again = cond[:1].cat(cond[1:]).to("cpu")
    assert len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(again.arguments(), cond.arguments(), strict=True))
