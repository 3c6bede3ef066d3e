-- ARGV: line, name, depth. Answers nothing if the ticket is gone, or its token and the names ahead.
call('HDEL', H, '')
local token = call('HGET', H, 'T:' .. ARGV[1] .. '\n' .. ARGV[2])
if not token then return {} end
local prefix = 'o:' .. ARGV[1] .. '\n'
local ahead = call('ZREVRANGEBYLEX', Z, '(' .. prefix .. token .. '\n' .. ARGV[2], '[' .. prefix, 'LIMIT', 0, ARGV[3])
for i, member in ipairs(ahead) do ahead[i] = string.sub(member, #prefix + 18) end
return { tonumber(token), ahead }
