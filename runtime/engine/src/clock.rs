//! The worker's clock: ticks since it started.

use std::time::{Duration, Instant};

use godwit_protocol::report::Tick;

/// Counts from its creation, by the monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// Starts counting.
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// Returns the time since the start.
    pub(crate) fn now(self) -> Tick {
        Tick(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Returns how long it is until `tick`; nothing if it has passed.
    pub(crate) fn until(self, tick: Tick) -> Duration {
        Duration::from_nanos(tick.0.saturating_sub(self.now().0))
    }
}
