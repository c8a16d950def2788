//! A pane of `fault top`: rows of which one is selected, by what it is and not by its number.

use ratatui::widgets::TableState;

/// The number of rows that a page key moves by.
pub const PAGE: isize = 10;

/// A move of the selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// So many rows down, or up if negative.
    By(isize),
    /// To the first row.
    First,
    /// To the last row.
    Last,
}

/// The rows of a pane.
#[derive(Debug)]
pub struct Pane<K> {
    rows: Vec<K>,
    /// What is selected. It stays selected when it has gone, until the selection is moved.
    pub selected: Option<K>,
    /// The row of `selected`, or its last one.
    row: usize,
    /// What the widget needs: the highlighted row, and how far it is scrolled.
    pub state: TableState,
}

impl<K> Default for Pane<K> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            selected: None,
            row: 0,
            state: TableState::default(),
        }
    }
}

impl<K: PartialEq + Clone> Pane<K> {
    /// Shows these rows.
    pub fn arrange(&mut self, rows: Vec<K>) {
        self.rows = rows;
        if self.selected.is_none() {
            self.selected = self.rows.first().cloned();
        }
        let found = self
            .selected
            .as_ref()
            .and_then(|selected| self.rows.iter().position(|row| row == selected));
        if let Some(row) = found {
            self.row = row;
        }
        self.state.select(found);
    }

    /// Moves the selection.
    pub fn go(&mut self, to: Move) {
        let last = self.rows.len().saturating_sub(1);
        self.row = match to {
            Move::By(by) => self.row.saturating_add_signed(by).min(last),
            Move::First => 0,
            Move::Last => last,
        };
        self.selected = self.rows.get(self.row).cloned();
        self.state
            .select(self.selected.is_some().then_some(self.row));
    }
}
