//! Asks the target's agent, over a connection of its own, where the container of a migration is.

use std::time::Duration;

use godwit_protocol::fate::FateAnswer;
use godwit_protocol::wire::Message;
use godwit_protocol::{MigrationId, MigrationRequest};

use crate::link::{Link, LinkError};

/// Returns the agent's answer.
pub(super) fn ask(request: &MigrationRequest, migration: &MigrationId) -> Result<FateAnswer, LinkError> {
    let mut link = Link::connect(&request.host, request.port)?;
    link.set_silence_max(Some(ANSWER_MAX))?;
    link.send(&Message::FateQuery { migration: migration.clone() })?;
    match link.receive()? {
        Message::FateAnswer(answer) => Ok(answer),
        other => Err(LinkError::Unexpected { kind: other.kind(), expected: "the answer about the fate" }),
    }
}

/// The agent may have to kill what was restored before it can answer.
const ANSWER_MAX: Duration = Duration::from_secs(15);
