//! Replays of small traces against counts made by hand and by a naive cache.
