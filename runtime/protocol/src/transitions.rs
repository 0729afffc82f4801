//! What the tables of both machines have in common.

/// State, event, guard, next state, actions.
pub(crate) type Row = (&'static str, &'static str, &'static str, &'static str, &'static [&'static str]);

/// Claims that the diagram in the documentation of a module is its table.
pub(crate) fn assert_drawn(module: &str, table: &[Row]) {
    let drawn: Vec<_> = module
        .lines()
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.contains("-->"))
        .collect();
    let listed: Vec<_> = table
        .iter()
        .map(|(from, event, guard, to, _)| match *guard {
            "" => format!("{from} --{event}--> {to}"),
            guard => format!("{from} --{event} [{guard}]--> {to}"),
        })
        .collect();
    assert_eq!(drawn, listed);
}

/// Claims that every row has been tried.
pub(crate) fn assert_tried(table: &[Row], tried: &[bool]) {
    let untried: Vec<_> = table.iter().zip(tried).filter(|(_, tried)| !**tried).collect();
    assert!(untried.is_empty(), "rows that nothing comes to: {untried:?}");
}
