-- Answers this server's clock in microseconds.
return now
