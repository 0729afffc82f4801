//! Coming back to a target that lacks pages, over new connections.
//!
//! ```text
//! FateQuery ──► filling? ──► Rejoin ──► Lacking… LackingEnd ──► the page streams, anew
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_memory::{PageRange, PageSet};
use godwit_protocol::fate::FateAnswer;
use godwit_protocol::wire::Message;
use godwit_protocol::{MigrationId, MigrationRequest};

use super::ask;
use crate::link::{Link, LinkError};
use crate::pages::{self, PageStreams};

/// What the target has to say.
pub(super) enum Answer {
    /// The container is not lacking what could be sent now.
    Fate(FateAnswer),
    /// The way to it is open again.
    Open(Box<Reopened>),
}

/// Everything that a target which lacks pages gets them over, and which these are, by space.
pub(super) struct Reopened {
    pub(super) link: Link,
    pub(super) streams: Arc<PageStreams>,
    pub(super) lacking: BTreeMap<i32, PageSet>,
}

/// Asks for the container's fate; if it lacks pages, and `reopen` is wanted, opens link and streams.
pub(super) fn rejoin(
    request: &MigrationRequest,
    migration: &MigrationId,
    bulk_count: u8,
    reopen: bool,
) -> Result<Answer, LinkError> {
    let fate = ask::ask(request, migration)?;
    if fate != FateAnswer::Filling || !reopen {
        return Ok(Answer::Fate(fate));
    }
    let mut link = Link::connect(&request.host, request.port)?;
    link.set_silence_max(Some(LACKING_MAX))?;
    link.send(&Message::Rejoin { migration: migration.clone() })?;
    let lacking = lacking(&mut link)?;
    link.set_silence_max(None)?;
    let streams = PageStreams::open(&request.host, request.port, migration, bulk_count)?;
    Ok(Answer::Open(Box::new(Reopened { link, streams: Arc::new(streams), lacking })))
}

fn lacking(link: &mut Link) -> Result<BTreeMap<i32, PageSet>, LinkError> {
    let mut lacking = BTreeMap::<i32, Vec<PageRange>>::new();
    let mut runs_left = RUNS_LEFT_MAX;
    loop {
        match link.receive()? {
            Message::Lacking { space, runs } if runs.len() <= runs_left => {
                runs_left -= runs.len();
                lacking.entry(space).or_default().extend(runs.into_iter().filter_map(pages::range));
            }
            Message::LackingEnd => {
                return Ok(lacking
                    .into_iter()
                    .map(|(space, ranges)| (space, pages::sorted(ranges)))
                    .collect());
            }
            other => {
                let expected = "what the target lacks";
                return Err(LinkError::Unexpected { kind: other.kind(), expected });
            }
        }
    }
}

/// Time for the worker to say what it lacks, from one frame to the next.
const LACKING_MAX: Duration = Duration::from_secs(15);

/// As many as the pages of a container of 64 GiB, each apart from the next.
const RUNS_LEFT_MAX: usize = 16 << 20;
