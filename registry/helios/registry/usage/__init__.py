"""Usage of models by the hour: counted, forecast, and turned into advice on how warm models are kept.

The rows of ``usage_hours`` are the only state. A forecast is made by replaying a model's rows, so nothing is lost with
a restart, no model of a forecaster is stored, and a better forecaster needs no migration.
"""
