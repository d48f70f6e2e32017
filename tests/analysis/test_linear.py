import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from phreg.analysis.linear import fit_linear, fit_softmax


@settings(max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([2, 5]), st.sampled_from([1e-2, 1e-1]))
def test_softmax_is_scikit_learns_logistic_regression(seed, classes, penalty):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(60, 6, generator=generator) * torch.tensor([1.0, 2, 5, 0.1, 1, 3]) + 2
    labels = torch.randint(classes, (60,), generator=generator)
    labels[:classes] = torch.arange(classes)
    scores = fit_softmax(tokens, labels, classes, penalty)(tokens)

    inputs = ((tokens - tokens.mean(0)) / tokens.std(0, correction=0)).double().numpy()
    # It sums the loss over tokens; of two classes it fits one weight, the difference of ours, at twice the
    # penalty.
    strength = penalty * 60 * (0.5 if classes == 2 else 1)
    theirs = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=1000).fit(inputs, labels.numpy())
    expected = torch.from_numpy(theirs.predict_proba(inputs)).float()
    # Both stop a little short of the optimum, ours in fp32.
    torch.testing.assert_close(scores.softmax(1), expected, atol=2e-3, rtol=0)


@settings(max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0]))
def test_the_linear_map_is_scikit_learns_ridge(seed, penalty):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(40, 5, generator=generator) * 3 + 1
    targets = torch.randn(40, 2, generator=generator)
    inputs = ((tokens - tokens.mean(0)) / tokens.std(0, correction=0)).double().numpy()
    expected = Ridge(alpha=penalty * 40).fit(inputs, targets.double().numpy()).predict(inputs)
    found = fit_linear(tokens, targets, penalty)(tokens)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-4, rtol=0)


def test_a_channel_that_never_changes_does_no_harm():
    tokens = torch.tensor([[0.0, 7.0], [1.0, 7.0]] * 10)
    labels = torch.tensor([0, 1] * 10)
    assert torch.equal(fit_softmax(tokens, labels, 2, 1e-3)(tokens).argmax(1), labels)
    assert fit_linear(tokens, labels[:, None].float(), 0.1)(tokens).isfinite().all()


def test_probes_can_be_fitted_where_gradients_are_off():
    with torch.no_grad():
        probe = fit_softmax(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 2, 1e-3)
    assert probe.weight.abs().max() > 0
