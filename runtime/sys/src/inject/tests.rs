//! Children in every state a task can be in. They are forked, not spawned, so that each is exactly what its
//! test needs; between fork and exit they call nothing but async-signal-safe functions.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::ptrace;
use nix::unistd::Pid;

use super::*;
use crate::arena::Arena;
use crate::page_range::PAGE_BYTES;
use crate::userfaultfd::{Features, Userfaultfd};

const LIMIT: Duration = Duration::from_millis(500);

/// A child that is killed and reaped at the end.
struct Child(i32);

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: both calls take integers or null; the child is ours and has not been reaped.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: as above.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

/// Words that parent and children share.
#[derive(Clone, Copy)]
struct Shared(&'static [AtomicU64; 512]);

impl Shared {
    fn new() -> Self {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel picks a free place.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: a fresh page of zeros, never unmapped.
        Self(unsafe { &*page.cast::<[AtomicU64; 512]>() })
    }

    fn get(self, index: usize) -> u64 {
        self.0[index].load(Ordering::SeqCst)
    }

    fn wait_for(self, index: usize, value: u64) {
        let begin = Instant::now();
        while self.get(index) < value {
            assert!(begin.elapsed() < Duration::from_secs(20), "word {index} is {}", self.get(index));
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

static COUNT: std::sync::atomic::AtomicPtr<AtomicU64> =
    std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());

fn child(shared: Shared, body: fn(Shared)) -> Child {
    // SAFETY: the child runs `body`, which calls async-signal-safe functions only, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        body(shared);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(0) };
    }
    assert!(pid > 0);
    Child(pid)
}

fn state(pid: i32) -> char {
    Status::read(pid, pid).unwrap().state
}

fn wait_state(pid: i32, wanted: char) {
    let begin = Instant::now();
    while state(pid) != wanted {
        assert!(begin.elapsed() < Duration::from_secs(20), "state {}", state(pid));
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn assert_works(injected: &Injected) {
    let faults = Userfaultfd::from_fd(injected.fd.try_clone().unwrap());
    faults.enable(Features::WP_ASYNC.with(Features::WP_UNPOPULATED)).unwrap();
    assert!(faults.is_alive().unwrap());
}

fn nap(nanoseconds: i64) -> i32 {
    let time = libc::timespec { tv_sec: nanoseconds / 1_000_000_000, tv_nsec: nanoseconds % 1_000_000_000 };
    // SAFETY: `time` is valid, no remainder is asked for.
    unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) }
}

#[test]
fn a_busy_task_is_injected_often_and_computes_on() {
    let shared = Shared::new();
    let child = child(shared, |shared| {
        // Any register that came back wrong shows in the sum.
        let mut sum = 0_u64;
        for step in 0_u64.. {
            sum = sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step);
            shared.0[2].store(sum, Ordering::Relaxed);
            shared.0[1].store(step, Ordering::Release);
            if shared.0[3].load(Ordering::Relaxed) == 1 {
                break;
            }
        }
        shared.0[4].store(1, Ordering::SeqCst);
        nap(60_000_000_000);
    });
    shared.wait_for(1, 1000);
    let mut stops = Vec::new();
    for _ in 0..200 {
        let injected = userfaultfd(child.0, LIMIT).unwrap();
        stops.push(injected.stopped);
        assert_works(&injected);
    }
    shared.0[3].store(1, Ordering::SeqCst);
    shared.wait_for(4, 1);
    let mut sum = 0_u64;
    for step in 0..=shared.get(1) {
        sum = sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step);
    }
    assert_eq!(shared.get(2), sum);
    stops.sort();
    println!("stop: median {:?}, longest {:?}", stops[stops.len() / 2], stops[stops.len() - 1]);
}

#[test]
fn system_calls_that_were_interrupted_go_on() {
    let shared = Shared::new();
    let child = child(shared, |shared| {
        let begin = Instant::now();
        let answer = nap(300_000_000);
        shared.0[0].store(if answer == 0 { 1 } else { 2 }, Ordering::SeqCst);
        shared.0[1].store(u64::try_from(begin.elapsed().as_millis()).unwrap_or(0), Ordering::SeqCst);
        // SAFETY: epoll_create1 takes an integer.
        let epoll = unsafe { libc::epoll_create1(0) };
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 1];
        // SAFETY: there is room for one event.
        let answer = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), 1, 200) };
        shared.0[2].store(if answer == 0 { 1 } else { 2 }, Ordering::SeqCst);
        // SAFETY: sigsuspend reads one valid mask; it ends with a handled signal only.
        let mut mask = unsafe { std::mem::zeroed::<libc::sigset_t>() };
        // SAFETY: as above.
        unsafe { libc::sigsuspend(&raw mut mask) };
        shared.0[3].store(1, Ordering::SeqCst);
    });
    wait_state(child.0, 'S');
    while shared.get(0) == 0 {
        assert_works(&userfaultfd(child.0, LIMIT).unwrap());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Its time limit begins anew with each stop, so these are few.
    for _ in 0..5 {
        assert_works(&userfaultfd(child.0, LIMIT).unwrap());
        std::thread::sleep(Duration::from_millis(5));
    }
    shared.wait_for(2, 1);
    assert_eq!(shared.get(0), 1, "nanosleep was restarted until its end");
    assert!((300..400).contains(&shared.get(1)), "slept {} ms", shared.get(1));
    assert_eq!(shared.get(2), 1, "epoll_wait ran into its time limit, not into EINTR");
    for _ in 0..20 {
        userfaultfd(child.0, LIMIT).unwrap();
    }
    assert_eq!(shared.get(3), 0, "sigsuspend still waits");
}

#[test]
fn no_queued_signal_is_lost_or_doubled() {
    extern "C" fn count(_: i32) {
        let counter = COUNT.load(Ordering::SeqCst);
        // SAFETY: set to a word of the shared page before the handler is installed.
        unsafe { (*counter).fetch_add(1, Ordering::SeqCst) };
    }
    let shared = Shared::new();
    let child = child(shared, |shared| {
        COUNT.store(std::ptr::from_ref(&shared.0[0]).cast_mut(), Ordering::SeqCst);
        let handler: extern "C" fn(i32) = count;
        // SAFETY: installs an async-signal-safe handler.
        unsafe { libc::signal(libc::SIGRTMIN() + 3, handler as libc::sighandler_t) };
        shared.0[1].store(1, Ordering::SeqCst);
        loop {
            nap(1_000_000);
        }
    });
    shared.wait_for(1, 1);
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0_u64;
            for _ in 0..3000 {
                let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
                // SAFETY: sigqueue takes integers; the child is ours.
                if unsafe { libc::sigqueue(child.0, libc::SIGRTMIN() + 3, value) } == 0 {
                    sent += 1;
                }
                std::thread::yield_now();
            }
            sent
        });
        while !sender.is_finished() {
            assert_works(&userfaultfd(child.0, LIMIT).unwrap());
        }
        sender.join().unwrap()
    });
    shared.wait_for(0, sent);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(shared.get(0), sent);
}

#[test]
fn a_stopped_task_stays_stopped_and_a_stop_in_between_is_not_lost() {
    let shared = Shared::new();
    let child = child(shared, |shared| {
        loop {
            shared.0[0].fetch_add(1, Ordering::SeqCst);
            nap(100_000);
        }
    });
    for _ in 0..50 {
        let before = shared.get(0);
        std::thread::scope(|scope| {
            // SAFETY: kill takes integers; the child is ours.
            scope.spawn(|| unsafe { libc::kill(child.0, libc::SIGSTOP) });
            assert_works(&userfaultfd(child.0, LIMIT).unwrap());
        });
        wait_state(child.0, 'T');
        assert_works(&userfaultfd(child.0, LIMIT).unwrap());
        wait_state(child.0, 'T');
        // SAFETY: as above.
        unsafe { libc::kill(child.0, libc::SIGCONT) };
        shared.wait_for(0, before + 2);
    }
}

#[test]
fn a_task_that_cannot_be_injected_is_named_and_left_alone() {
    let shared = Shared::new();
    let zombie = child(shared, |_| {});
    wait_state(zombie.0, 'Z');
    assert!(matches!(userfaultfd(zombie.0, LIMIT), Err(InjectError::Zombie { pid }) if pid == zombie.0));
    assert!(matches!(userfaultfd(i32::MAX, LIMIT), Err(InjectError::Gone { .. })));
    let traced = child(shared, |_| assert_eq!(nap(60_000_000_000), 0));
    let (ready, done) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            ptrace::seize(Pid::from_raw(traced.0), ptrace::Options::empty()).unwrap();
            ready.wait();
            done.wait();
        });
        ready.wait();
        let own = i32::try_from(std::process::id()).unwrap();
        let answer = userfaultfd(traced.0, LIMIT);
        done.wait();
        assert!(matches!(answer, Err(InjectError::Traced { by, .. }) if by == own), "{answer:?}");
    });
    // A tracer lets go when its thread is gone, and that is after the scope has ended.
    while !tracer_is_gone(traced.0) {
        std::thread::yield_now();
    }
    assert_works(&userfaultfd(traced.0, LIMIT).unwrap());
}

fn tracer_is_gone(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains("TracerPid:\t0\n")
}

#[test]
fn a_task_in_vfork_is_let_go_in_bounded_time() {
    let shared = Shared::new();
    let parent = child(shared, |shared| {
        // A stack for the child, which shares this memory while the parent sleeps in the kernel.
        let Ok(stack) = Arena::map(16 * PAGE_BYTES) else { return };
        extern "C" fn sleeper(_: *mut libc::c_void) -> i32 {
            nap(300_000_000);
            0
        }
        let top = std::ptr::with_exposed_provenance_mut(usize::try_from(stack.range().end()).unwrap_or(0));
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the child runs on its own stack and only sleeps; the parent waits in the kernel meanwhile.
        unsafe { libc::clone(sleeper, top, flags, std::ptr::null_mut()) };
        shared.0[0].store(1, Ordering::SeqCst);
        nap(60_000_000_000);
    });
    wait_state(parent.0, 'D');
    let begin = Instant::now();
    let answer = userfaultfd(parent.0, Duration::from_millis(50));
    assert!(matches!(answer, Err(InjectError::NotStopping { state: 'D', limit_ms: 50, .. })), "{answer:?}");
    assert!(begin.elapsed() < Duration::from_millis(200));
    shared.wait_for(0, 1);
    wait_state(parent.0, 'S');
    assert_works(&userfaultfd(parent.0, LIMIT).unwrap());
}

#[test]
fn a_filter_that_kills_does_not_see_the_call() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP: suspending a seccomp filter needs CAP_SYS_ADMIN");
        return;
    }
    let shared = Shared::new();
    let child = child(shared, |shared| {
        let statement = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
        let call = u32::try_from(libc::SYS_userfaultfd).unwrap_or(0);
        let mut filter = [
            statement(0x20, 0, 0, 0),
            statement(0x15, call, 0, 1),
            statement(0x06, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
            statement(0x06, libc::SECCOMP_RET_ALLOW, 0, 0),
        ];
        let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
        // SAFETY: prctl takes integers here.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: `program` describes four valid instructions.
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        shared.0[0].store(1, Ordering::SeqCst);
        loop {
            shared.0[1].fetch_add(1, Ordering::SeqCst);
            nap(100_000);
        }
    });
    shared.wait_for(0, 1);
    for _ in 0..20 {
        assert_works(&userfaultfd(child.0, LIMIT).unwrap());
    }
    let before = shared.get(1);
    shared.wait_for(1, before + 3);
    assert!(Status::read(child.0, child.0).unwrap().filtered);
}

#[test]
fn a_32_bit_task_is_refused_by_name() {
    // The smallest program of its kind: pause(2), again and again.
    const CODE: [u8; 9] = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let mut image = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2_u16, 3] {
        image.extend(half.to_le_bytes());
    }
    let size = 84 + u32::try_from(CODE.len()).unwrap();
    for word in [1_u32, 0x0804_8054, 52, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    for half in [52_u16, 32, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for word in [1_u32, 0, 0x0804_8000, 0x0804_8000, size, size, 5, 0x1000] {
        image.extend(word.to_le_bytes());
    }
    image.extend(CODE);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pause32");
    fs::write(&path, image).unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let Ok(mut child) = std::process::Command::new(&path).spawn() else {
        eprintln!("SKIP: this kernel runs no 32-bit programs");
        return;
    };
    let pid = i32::try_from(child.id()).unwrap();
    wait_state(pid, 'S');
    let answer = userfaultfd(pid, LIMIT);
    let alive = child.try_wait().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        matches!(answer, Err(InjectError::Compat { .. } | InjectError::NoInstruction { .. })),
        "{answer:?}"
    );
    assert!(alive.is_none(), "it was left alone");
}
