-- ARGV: client, number of tickets, the tickets, the directories.
-- Answers for each ticket the microseconds left of its lease, or -1 if it is gone; for each directory its
-- mark; and the microseconds to the first timer. Whoever asks is told on his channel when a ticket goes.
call('HDEL', H, '')
local tickets, marks = {}, {}
local count = tonumber(ARGV[2])
for i = 1, count do
  local field = ARGV[i + 2]
  local ticket = call('HMGET', H, 'T:' .. field, 'W:' .. field)
  if ticket[1] then
    if not string.find(ticket[2] or '', ARGV[1], 1, true) then
      call('HSET', H, 'W:' .. field, (ticket[2] or '') .. ARGV[1] .. ' ')
    end
    -- Forgotten after a minute unless asked again, so that a dead client leaves nothing behind.
    call('ZADD', T, number(now + 60000000), 'w:' .. field .. '\n' .. ARGV[1])
    local deadline = call('ZSCORE', T, 'l:' .. string.match(field, '\n([^-]*)'))
    tickets[i] = math.max(tonumber(deadline or now) - now, 0)
  else
    tickets[i] = -1
  end
end
for i = count + 3, #ARGV do marks[#marks + 1] = observe(ARGV[i]) end
store()
return { tickets, marks, first_timer() }
