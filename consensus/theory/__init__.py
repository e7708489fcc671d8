"""The theory of the paper, evaluated: proximal points, stationarity, the general model (4)."""
