"""Forecast weights reproduce the polynomials they claim to."""

import pytest

from vidaccel.plans.forecast import weights

KNOWN = [0.95, 0.8, 0.55]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("sigma", [0.5, 0.3, 0.0])
def test_polynomials_up_to_the_order_are_exact(order, sigma):
    def polynomial(x):
        return sum((k + 1) * x**k for k in range(order + 1))

    coefficients = weights(KNOWN, sigma, order)
    forecast = sum(w * polynomial(x) for w, x in zip(coefficients, KNOWN, strict=True))
    assert forecast == pytest.approx(polynomial(sigma))


def test_order_zero_holds_the_last():
    assert weights(KNOWN, 0.1, 0) == (0.0, 0.0, 1.0)


def test_the_degree_is_what_the_points_allow():
    assert weights([0.8], 0.1, 2) == (1.0,)
    assert weights([0.9, 0.8], 0.7, 2) == pytest.approx(weights([0.9, 0.8], 0.7, 1))
    assert weights([0.8, 0.8], 0.7, 1) == (0.0, 1.0)
    assert sum(weights([0.8, 0.8, 0.6], 0.5, 2)) == pytest.approx(1)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_weights_sum_to_one(order):
    assert sum(weights(KNOWN, 0.123, order)) == pytest.approx(1)
