//! Names of states, events and actions, for logs and for the table.

use super::{Action, Event, PeerEvent, State};
use crate::fate::FateAnswer;
use crate::rootfs::Pass;

impl State {
    pub(super) const fn label(&self) -> &'static str {
        match self {
            Self::Connecting { .. } => "Connecting",
            Self::Negotiating { .. } => "Negotiating",
            Self::Preparing => "Preparing",
            Self::CopyingRootfs => "CopyingRootfs",
            Self::AwaitingRootfs => "AwaitingRootfs",
            Self::OpeningStreams => "OpeningStreams",
            Self::Scanning { .. } => "Scanning",
            Self::SendingRound { .. } => "SendingRound",
            Self::Freezing { .. } => "Freezing",
            Self::Settling { .. } => "Settling",
            Self::Dumping { .. } => "Dumping",
            Self::Transferring { .. } => "Transferring",
            Self::AwaitingReceipt { .. } => "AwaitingReceipt",
            Self::Restoring { .. } => "Restoring",
            Self::Confirming { .. } => "Confirming",
            Self::Committing { .. } => "Committing",
            Self::Asking { .. } => "Asking",
            Self::Serving { .. } => "Serving",
            Self::Rejoining { .. } => "Rejoining",
            Self::Killing { .. } => "Killing",
            Self::AwaitingRelease { .. } => "AwaitingRelease",
            Self::CleaningUp { .. } => "CleaningUp",
            Self::Burying { .. } => "Burying",
            Self::RollingBack { .. } => "RollingBack",
            Self::Done { .. } => "Done",
        }
    }
}

impl Event {
    /// Returns the event's name.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::LinkUp => "LinkUp",
            Self::Peer(event) => event.label(),
            Self::RootfsSent => "RootfsSent",
            Self::StreamsOpen => "StreamsOpen",
            Self::Scanned { .. } => "Scanned",
            Self::RoundSent(_) => "RoundSent",
            Self::Rejoined => "Rejoined",
            Self::Froze => "Froze",
            Self::Unsettled { .. } => "Unsettled",
            Self::Dumped => "Dumped",
            Self::Confirmed => "Confirmed",
            Self::StateSent => "StateSent",
            Self::Answered(FateAnswer::Here) => "Here",
            Self::Answered(FateAnswer::NotHere) => "NotHere",
            Self::Answered(FateAnswer::Pending) => "Pending",
            Self::Answered(FateAnswer::Filling) => "Filling",
            Self::Answered(FateAnswer::Lost) => "Lost",
            Self::AskFailed { .. } => "AskFailed",
            Self::Killed => "Killed",
            Self::Release => "Release",
            Self::CleanedUp => "CleanedUp",
            Self::RolledBack => "RolledBack",
            Self::RollbackFailed { .. } => "RollbackFailed",
            Self::Failed { .. } => "Failed",
            Self::LinkLost { .. } => "LinkLost",
            Self::Cancel => "Cancel",
            Self::Deadline => "Deadline",
        }
    }
}

impl PeerEvent {
    /// Returns the event's name.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Accepted(_) => "Accepted",
            Self::Rejected { .. } => "Rejected",
            Self::Preparing(_) => "Preparing",
            Self::Ready => "Ready",
            Self::RootfsApplied(Pass::Live) => "RootfsApplied",
            Self::RootfsApplied(Pass::Final) => "FinalApplied",
            Self::RoundReceived(_) => "RoundReceived",
            Self::MemoryComplete(_) => "MemoryComplete",
            Self::Received => "Received",
            Self::Restored => "Restored",
            Self::Resumed(_) => "Resumed",
            Self::Aborted { .. } => "Aborted",
            Self::Nonsense { .. } => "Nonsense",
        }
    }
}

impl Action {
    /// Returns the action's name.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Connect => "Connect",
            Self::SendOffer => "SendOffer",
            Self::SendBlobs => "SendBlobs",
            Self::SendRootfs => "SendRootfs",
            Self::Freeze => "Freeze",
            Self::OpenStreams => "OpenStreams",
            Self::Scan => "Scan",
            Self::SendRound { .. } => "SendRound",
            Self::Serve => "Serve",
            Self::Rejoin { .. } => "Rejoin",
            Self::Dump { .. } => "Dump",
            Self::Commit => "Commit",
            Self::AskFate { .. } => "AskFate",
            Self::Kill => "Kill",
            Self::ReportMoved => "ReportMoved",
            Self::CleanUp => "CleanUp",
            Self::RollBack { .. } => "RollBack",
            Self::LeaveFrozen => "LeaveFrozen",
            Self::ReportChecked => "ReportChecked",
            Self::ReportFailed { .. } => "ReportFailed",
        }
    }
}
