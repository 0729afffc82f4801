//! Checkpoint: an image in a directory, or a migration if that is what the path asks for.

use std::{fs, path::Path, sync::Arc, time::SystemTime};

use containerd_shim_protos::events::task::TaskCheckpointed;
use godwit_protocol::MigrationRequest;

use super::{
    Container, Phase,
    actor::{Reply, answer},
};
use crate::{
    error::{Result, ShimError},
    options::CheckpointOptions,
    verb::Verb,
};

impl Container {
    /// Checkpoints into `path`, or migrates; answers `reply`, which for a migration is before its very end.
    pub(super) async fn checkpoint(
        self: &Arc<Self>,
        path: String,
        options: CheckpointOptions,
        reply: Reply<()>,
    ) {
        // `path` is what containerd made of the option, or an empty directory of its own: see `options`.
        let asked = [&options.image_path, &path].into_iter().find(|text| MigrationRequest::is_request(text));
        match asked.map(|text| text.parse::<MigrationRequest>()) {
            Some(Ok(request)) => {
                leave_a_note(Path::new(&path), &request);
                self.migrate(request, reply).await;
            }
            Some(Err(error)) => answer(reply, Err(error.into())),
            None => answer(reply, self.checkpoint_to(&path, options).await),
        }
    }

    async fn checkpoint_to(&self, path: &str, options: CheckpointOptions) -> Result<()> {
        {
            let state = self.lock();
            self.not_migrating(&state, "checkpoint")?;
            match state.phase {
                Phase::Running | Phase::Paused => {}
                Phase::Created | Phase::Restorable(_) => {
                    return Err(ShimError::WrongState { verb: "checkpoint", state: "created", what: "task" });
                }
                _ => {
                    let now = state.phase.name();
                    return Err(ShimError::WrongState { verb: "checkpoint", state: now, what: "container" });
                }
            }
        }
        self.be_whole("checkpoint").await?;
        let image = if path.is_empty() { &options.image_path } else { path };
        if image.is_empty() {
            let reason = "a directory, or godwit://HOST, is needed";
            return Err(ShimError::RefusedOption { name: "image_path".to_owned(), reason });
        }
        let image = image.to_owned();
        let own_work = options.work_path.is_empty();
        let work =
            if own_work { self.bundle.join("work/criu-work") } else { options.work_path.clone().into() };
        fs::create_dir_all(&work).map_err(ShimError::io(format!("make {}", work.display())))?;
        let verb = Verb::Checkpoint(options.into_verb(image.clone().into(), work.clone()));
        let done = self.run(verb).await;
        let done = done.map_err(|error| self.with_dump_log(error, &work));
        if own_work {
            fs::remove_dir_all(&work).ok();
        }
        done?;
        self.shared.events.publish(&TaskCheckpointed {
            container_id: self.id.clone(),
            checkpoint: image,
            ..TaskCheckpointed::default()
        });
        Ok(())
    }

    /// Keeps CRIU's log where it outlives the work directory, and says where.
    fn with_dump_log(&self, error: ShimError, work: &Path) -> ShimError {
        let ShimError::Runtime { verb, message } = error else { return error };
        let log = self.bundle.join("criu-dump.log");
        let first = message.lines().next().unwrap_or_default();
        match fs::copy(work.join("dump.log"), &log) {
            Ok(_) => ShimError::Runtime { verb, message: format!("{first} path= {}", log.display()) },
            // CRIU was never reached.
            Err(_) => ShimError::Runtime { verb, message },
        }
    }
}

/// Puts something unique into the directory that containerd will store as the checkpoint's content.
///
/// Where containerd does not take the request for a path, it makes an empty directory and archives it into its
/// content store when the migration is over; a second empty one has the same digest, and would be an error.
fn leave_a_note(path: &Path, request: &MigrationRequest) {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let note = format!("{request} asked for at {} ns\n", since_epoch.as_nanos());
    if path.is_dir()
        && let Err(error) = fs::write(path.join("migrated"), note)
    {
        log::warn!("failed to leave a note in {}: {error}", path.display());
    }
}
