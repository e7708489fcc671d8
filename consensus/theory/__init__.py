"""The theory of the paper, evaluated numerically: prox, envelope, stationarity, model (4)."""
